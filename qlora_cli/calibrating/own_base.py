"""The base that a run makes for itself: calibrated on the rows to train, in the run's directory."""

import gc
import json
from pathlib import Path
from typing import Any

import torch

from qlora_cli.calibrating.calibration import Calibration, check_calibratable
from qlora_cli.calibrating.calibration_rows import CalibrationRows
from qlora_cli.errors import OutputDirectoryError
from qlora_cli.events import Noted, Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.loading.loader import load_planned
from qlora_cli.loading.save import NOTE, check_savable, save_quantized
from qlora_cli.model_files.checkpoint import read_json
from qlora_cli.model_files.digest import base_digest
from qlora_cli.model_files.source import fetch_weights


def make_base(load_plan: LoadPlan, rows: CalibrationRows, directory: Path, reporter: Reporter) -> None:
    """Write the base of `load_plan`, calibrated on `rows`, to `directory`, unless it is there already.

    Raises:
        ModelError: it can't be calibrated.
        DiskSpaceError: it does not fit on the disk.
        OutputDirectoryError: another base is there.
    """
    check_calibratable(load_plan)
    if directory.exists():
        _check_same(load_plan, rows, directory, reporter)
        return
    check_savable(load_plan, directory)
    calibrated = Calibration(load_plan, rows, reporter).run()
    loaded = load_planned(load_plan, reporter, calibrated=calibrated)
    save_quantized(loaded, directory, reporter)
    del loaded  # it is loaded again, from where it was written
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_same(load_plan: LoadPlan, rows: CalibrationRows, directory: Path, reporter: Reporter) -> None:
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
    if differing:
        raise OutputDirectoryError(
            f"{directory} holds a base that was made with other settings: {', '.join(differing)}",
            hint="Delete it, or choose another --output.",
        )
    reporter.report(Noted(message=f"{directory} is the calibrated base, made before"))
