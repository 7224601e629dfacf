"""Codes that were chosen for a model's weights before it is loaded, to be stored in place of the nearest ones."""

import torch
from bitsandbytes.functional import QuantState

from qlora_cli.quantization.load_report import CalibrationReport

HOST = torch.device("cpu")
Codes = dict[str, tuple[torch.Tensor, QuantState]]  # packed codes and states by the full name of the weight


class CalibratedWeights:
    """Codes in host memory, each until it is taken, and a `report` on them.

    Copying returns the same object: transformers copies the config that holds it.
    """

    def __init__(self, codes: Codes, report: CalibrationReport) -> None:
        self._codes = codes
        self.report = report

    def __deepcopy__(self, memo: dict[int, object]) -> "CalibratedWeights":
        return self

    def __contains__(self, name: str) -> bool:
        return name in self._codes

    def take(self, name: str, device: torch.device) -> tuple[torch.Tensor, QuantState]:
        """Return the codes and the state of a weight on `device`, and hold them no longer."""
        codes, state = self._codes.pop(name)
        state.to(device)
        return codes.to(device), state
