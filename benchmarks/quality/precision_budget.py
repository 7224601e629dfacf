"""Measure what layers in 16 bit gain, chosen by `qlora load --memory-budget`, against as many bytes of any layers.

    python -m benchmarks.quality.precision_budget MODEL DATA [--tokens N]

The budgets are shares of the bytes that all linear layers take more unquantized than in NF4. Layers are chosen on half
of the rows of DATA; the divergence from the unquantized model is that on the other half. Records are appended to
`benchmarks/results/`.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import RESULTS, append, cpu_hardware, now, results_file, revision, versions
from qlora_cli.calibrating.divergence_parts import LayerPart
from qlora_cli.calibrating.precision_budget import choose, keep_precision
from qlora_cli.calibrating.prediction_error import measure_prediction_error, predict_unquantized
from qlora_cli.events import SilentReporter
from qlora_cli.loading.load_plan import LoadPlan, plan_load
from qlora_cli.loading.loader import LoadedModel, load_planned
from qlora_cli.settings.models import LoadSettings
from qlora_cli.settings.resolve import Sources, resolve

SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4)
SEEDS = range(3)


def load(model: str, skipped: Sequence[str] = ()) -> tuple[LoadPlan, LoadedModel]:
    """Load a model in NF4 but for the layers `skipped`."""
    flags = {"model.name": ("MODEL", model)}
    if skipped:
        flags["quantization.skip_modules"] = ("skipped", ",".join(skipped))
    load_plan = plan_load(resolve(Sources(flags=flags), LoadSettings), SilentReporter())
    return load_plan, load_planned(load_plan, SilentReporter())


def by_chance(extra: dict[str, int], spare_bytes: int, seed: int) -> list[str]:
    """Return layers of at most `spare_bytes`, in an order that is drawn."""
    order = random.Random(seed).sample(sorted(extra), len(extra))  # noqa: S311 - any order will do
    worth = {name: (rank + 1) * extra[name] for rank, name in enumerate(order)}
    parts = [LayerPart(name=name, mean_kl=float(worth[name]), extra_bytes=extra[name]) for name in order]
    return [part.name for part in choose(parts, spare_bytes)]


def main() -> None:
    """Measure each budget, and print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--tokens", type=int, default=1024, help="to choose by, and as many to judge by")
    arguments = parser.parse_args()
    load_plan, _ = load(arguments.model)
    both = predict_unquantized(
        load_plan, (arguments.data,), SilentReporter(), num_tokens=arguments.tokens, num_halves=2
    )
    chosen_by, judged_by = both.halves()
    extra, takes = load_plan.layout.extra_bytes, load_plan.layout.inventory.total_bytes
    for share in SHARES:
        spare = int(share * sum(extra.values()))
        quantized = load(arguments.model)[1]
        kept, figures = keep_precision(quantized, load_plan, chosen_by, takes + spare, SilentReporter())
        chosen = measure_prediction_error(kept, judged_by).mean_kl
        drawn = [load(arguments.model, by_chance(extra, spare, seed))[1] for seed in (SEEDS if share else ())]
        chance = [measure_prediction_error(one, judged_by).mean_kl for one in drawn]
        record = {
            "model": Path(arguments.model).resolve().name,
            "data": Path(arguments.data).name,
            "tokens": int(judged_by.mask.sum()),
            "share": share,
            "weights_bytes": takes,
            "extra_bytes": figures.extra_bytes,
            "layers": f"{len(figures.modules)} of {figures.num_layers}",
            "expected_kl": figures.expected_kl,
            "chosen_kl": chosen,
            "kl_by_chance": chance,
            **{"time": now(), "revision": revision(), "versions": versions(), "hardware": cpu_hardware()},
        }
        append(results_file(RESULTS, "precision_budget"), record)
        others = ", ".join(f"{value:.4f}" for value in chance)
        print(
            f"{share:4.0%} of what all layers take more unquantized: {chosen:.4f} nats a token; by chance {others}",
            flush=True,
        )


if __name__ == "__main__":
    main()
