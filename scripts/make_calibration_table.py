"""Write the table of docs/how-to/calibrate.md: how long a calibration takes on a GPU, as predicted.

python scripts/make_calibration_table.py           # a test computes it again and fails when it is stale
"""

from pathlib import Path

import torch

from qlora_cli.calibrating.calibration_cost import calibrated_shapes, calibration_seconds
from qlora_cli.calibrating.calibration_rows import TOKENS_PER_FEATURE
from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.costs.step_time import rates_on
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import facts_of_catalogue
from qlora_cli.model_files.model_config import config_from
from qlora_cli.quantization.storage_plan import build_on_meta, plan_layout
from qlora_cli.settings.models import EstimateSettings
from qlora_cli.units import format_duration

PAGE = Path(__file__).resolve().parent.parent / "docs" / "how-to" / "calibrate.md"
MODELS = ("qwen3-0.6b", "llama-3.1-8b", "qwen3-30b-a3b", "llama-3.1-70b")
CARDS = ("RTX 4090", "A100 SXM 80GB", "H100 SXM")
HEAD = "| predicted | tokens |"


def row_of(name: str) -> str:
    """Return the row of a model of the catalogue."""
    model = find_in_catalogue(name)
    assert model is not None, name
    dtype = torch.bfloat16
    shapes = build_on_meta(config_from(name, facts_of_catalogue(model).content).config, dtype)
    quantization = EstimateSettings.model_validate({"model": {"name": name}}).quantization
    layout = plan_layout(shapes, quantization, dtype, device=torch.device("cuda"))
    weights = list(calibrated_shapes(shapes, layout))
    num_tokens = TOKENS_PER_FEATURE * max(weight.num_columns for weight in weights)
    times = []
    for card in CARDS:
        known = rates_on(find_gpu(card))
        assert known is not None, card
        times.append(format_duration(calibration_seconds(weights, num_tokens, known.rates)))
    return f"| {name} | {num_tokens:,} | {' | '.join(times)} |"


def table() -> str:
    """Return the table, as minutes and seconds."""
    return "\n".join([f"{HEAD} {' | '.join(CARDS)} |", f"|---|---|{'---|' * len(CARDS)}", *map(row_of, MODELS), ""])


def with_table(text: str) -> str:
    """Return the text of the page with the table as it is computed now."""
    before, _, rest = text.partition(HEAD)
    _, _, after = rest.partition("\n\n")
    return f"{before}{table()}\n{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
