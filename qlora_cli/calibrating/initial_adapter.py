"""What a calibrated adapter is initialized from: the loss of quantization, weighted by what its layers compute.

A base that a run made is stored quantized, so what it lost is stored with it.
"""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from qlora_cli.adapters.loftq import ranks_to_fit, residuals_to_fit
from qlora_cli.adapters.reader import read_tensors
from qlora_cli.calibrating.calibration import Calibration, check_calibratable
from qlora_cli.calibrating.calibration_rows import CalibrationRows
from qlora_cli.errors import ModelError
from qlora_cli.events import Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.model_files.checkpoint import read_header
from qlora_cli.quantization.residuals import LowRankFactors, QuantizationResiduals
from qlora_cli.settings.models import LoraSettings

FILE = "initial_adapter.safetensors"
RANKS = "ranks"  # in the metadata of the file
LEFT, RIGHT = ".left", ".right"


def calibrated_residuals(
    load_plan: LoadPlan, lora: LoraSettings, rows: CalibrationRows, reporter: Reporter
) -> QuantizationResiduals:
    """Return what the adapter of `lora` is initialized from, on the base of `load_plan`.

    Raises:
        ModelError: it can't be calibrated.
    """
    check_initializable(load_plan, lora)
    if has_residuals(load_plan.source.path):
        return _read(load_plan.source.path)
    residuals = residuals_to_fit(load_plan.shapes, load_plan.layout, lora)
    Calibration(load_plan, rows, reporter, residuals=residuals, chooses_codes=False).run()
    return residuals


def check_initializable(load_plan: LoadPlan, lora: LoraSettings) -> None:
    """Check that the adapter of `lora` can be calibrated for the base of `load_plan`, or was.

    Raises:
        ModelError: it can't.
    """
    path = load_plan.source.path
    if not has_residuals(path):
        residuals_to_fit(load_plan.shapes, load_plan.layout, lora)
        check_calibratable(load_plan)
    elif stored_ranks(path) != ranks_to_fit(load_plan.shapes, load_plan.layout, lora):
        raise ModelError(
            f"{path / FILE} is for an adapter of other ranks or on other layers",
            hint="Use the ranks and targets that the base was made with, or another lora.init_lora_weights.",
            setting="lora.init_lora_weights",
        )


def has_residuals(directory: Path) -> bool:
    """Return whether a base in `directory` was stored with residuals."""
    return (directory / FILE).is_file()


def stored_ranks(directory: Path) -> dict[str, int]:
    """Return the ranks of the stored residuals by the full name of the weight; none if there are none."""
    if not has_residuals(directory):
        return {}
    read_header(directory, FILE)  # which checks it
    with safe_open(directory / FILE, framework="pt") as file:
        ranks: dict[str, int] = json.loads((file.metadata() or {}).get(RANKS, "{}"))
    return ranks


def write_residuals(residuals: QuantizationResiduals, directory: Path) -> None:
    """Store residuals in the `directory` of a base."""
    tensors = {}
    for name, factors in residuals.factors.items():
        tensors[name + LEFT], tensors[name + RIGHT] = factors.left.contiguous(), factors.right.contiguous()
    save_file(tensors, directory / FILE, metadata={RANKS: json.dumps(dict(residuals.ranks))})


def _read(directory: Path) -> QuantizationResiduals:
    tensors, ranks = read_tensors(directory / FILE), stored_ranks(directory)
    factors = {
        name: LowRankFactors(left=tensors[name + LEFT], right=tensors[name + RIGHT])
        for name in ranks
        if {name + LEFT, name + RIGHT} <= tensors.keys()
    }
    return QuantizationResiduals(ranks=ranks, factors=factors)
