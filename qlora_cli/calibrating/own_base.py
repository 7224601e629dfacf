"""The base that a run makes for itself: calibrated on the rows to train, in the run's directory."""

import gc
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qlora_cli.adapters.loftq import ranks_to_fit, residuals_to_fit
from qlora_cli.calibrating.calibration import Calibration, check_calibratable
from qlora_cli.calibrating.calibration_rows import CalibrationRows
from qlora_cli.calibrating.initial_adapter import stored_ranks, write_residuals
from qlora_cli.errors import OutputDirectoryError
from qlora_cli.events import Noted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import load_planned
from qlora_cli.loading.save import NOTE, check_savable, save_quantized
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.digest import base_digest
from qlora_cli.model_files.source import fetch_weights
from qlora_cli.settings.choices import LoraInit
from qlora_cli.settings.models import LoraSettings


def make_base(
    load_plan: LoadPlan, lora: LoraSettings, rows: CalibrationRows, directory: Path, reporter: Reporter
) -> None:
    """Write the base of `load_plan`, calibrated on `rows`, to `directory`, unless it is there already.

    If the adapter of `lora` is to be calibrated, too, what it is initialized from is written with the base.

    Raises:
        ModelError: it can't be calibrated.
        DiskSpaceError: it does not fit on the disk.
        OutputDirectoryError: another base is there.
    """
    check_calibratable(load_plan)
    if directory.exists():
        _check_same(load_plan, lora, rows, directory, reporter)
        return
    check_savable(load_plan, directory)
    residuals = None
    if lora.init_lora_weights == LoraInit.CALIBRATED:
        residuals = residuals_to_fit(load_plan.shapes, load_plan.layout, lora)
    calibrated = Calibration(load_plan, rows, reporter, residuals=residuals).run()
    loaded = load_planned(load_plan, reporter, calibrated=calibrated)
    also = None if residuals is None else partial(write_residuals, residuals)
    save_quantized(loaded, directory, reporter, also=also)
    del loaded  # it is loaded again, from where it was written
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_same(
    load_plan: LoadPlan, lora: LoraSettings, rows: CalibrationRows, directory: Path, reporter: Reporter
) -> None:
    note: dict[str, Any] = read_json(directory / NOTE) if (directory / NOTE).is_file() else {}
    fetch_weights(load_plan.source, reporter)
    expected = {
        "model": ("source_digest", base_digest(load_plan.source.path)),
        "quantization": ("quantization", json.loads(load_plan.settings.quantization.model_dump_json())),
    }
    differing = [what for what, (key, value) in expected.items() if note.get(key) != value]
    calibration = note.get("calibration") or {}
    if (calibration.get("fingerprint"), calibration.get("num_tokens")) != (rows.fingerprint, rows.num_tokens):
        differing.append("rows")
    if lora.init_lora_weights == LoraInit.CALIBRATED:
        ranks = ranks_to_fit(load_plan.shapes, load_plan.layout, lora)
        differing += ["adapter"] if stored_ranks(directory) != ranks else []
    if differing:
        raise OutputDirectoryError(
            f"{directory} holds a base that was made with other settings: {', '.join(differing)}",
            hint="Delete it, or choose another --output.",
        )
    reporter.report(Noted(message=f"{directory} is the calibrated base, made before"))
