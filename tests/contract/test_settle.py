"""Settings have one owner: they are settled once, and nothing else changes them later, or knows which were given."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

import qlora_cli
from qlora_cli.errors import ModelError
from qlora_cli.settings.models import TrainSettings, all_settings, metadata_of
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from qlora_cli.settings.settle import InferredSettings, inferred_origin, resolved_in_code, settle
from qlora_cli.tokenizing.positions import limit_length

PACKAGE = Path(qlora_cli.__file__).parent
OWNED = re.compile(r"model_fields_set|model_copy\(|model_construct\(")
FLAGS = {"model.name": "m", "data.dataset": "d", "output.directory": "o"}
FILE = inferred_origin("run.json")

# The modules that settle, and how often: each command once, and a value that is lowered when a machine demands it.
SETTLES = {
    "cli/commands/inspect_data.py": 1,  # the positions of the model, whose weights are not needed
    "cli/commands/train.py": 1,  # the number of processes, which a launcher has started
    "cli/commands/predicted_data.py": 1,  # those and the settings of a run, before its data is read
    "cli/commands/memory_request.py": 1,  # the number of GPUs that is named with their card
    "loading/model_outline.py": 3,  # loads of a model, which give its number of positions; and a merge's base
    "memory/estimator.py": 2,  # a prediction, which needs no files: the same two steps
    "tuning/tuning_checks.py": 1,  # what trials leave to the run, and the rows that they are measured on
    "training/checks/memory_plan.py": 1,  # what memory decides: a plan, a leaner one, a smaller micro-batch
}
# The modules that ask about another load, run or inspection of data, which differs from this one in a value.
VARIES = {
    "calibrating/precision_budget.py": 1,  # the same load with more layers in 16 bit
    "cli/commands/predicted_data.py": 1,  # the repository with the tokenizer of a model of the catalogue
    "data/showing/inspection.py": 2,  # the rows themselves are inspected, not packed ones; in another order
    "data/rows/unused_columns.py": 1,  # the flags that a hint names are tried before they are named
    "data/feeding/prepare.py": 1,  # an inspection continues where training would be refused
    "evaluating/quantization_cost.py": 2,  # the same model unquantized, or the one that it was made from
    "memory/fitting/suggestions.py": 1,  # runs that would fit instead
    "memory/fitting/method_choice.py": 1,  # other ways to store the base
    "memory/memory_report.py": 1,  # the one that was chosen
    "memory/fitting/strategy.py": 3,  # a base that is sharded, where a whole one does not fit; among more GPUs
    "memory/host_run.py": 1,  # what a CPU keeps
    "memory/fitting/solver.py": 1,  # the largest that fits
    "memory/fitting/alternatives.py": 1,  # what fits, too
    "memory/fitting/card_ranking.py": 1,  # what takes the least on a card
    "memory/fitting/division.py": 1,  # other micro-batches
    "memory/fitting/plan.py": 3,  # what is chosen for a GPU, and what is recomputed otherwise
    "memory/run_batches.py": 3,  # the longest row that was read; micro-batches of other lengths
    "memory/tracing/meta_model.py": 1,  # values that the adapter begins with do not matter
    "merging/verifying/texts.py": 1,  # a few rows to compare on
    "model_files/merged.py": 1,  # the merged model, loaded as the adapter's base was
    "quantization/memory_check.py": 1,  # loads that would fit instead
    "training/checks/kept_layers.py": 1,  # the same run with more layers in 16 bit
    "training/checks/adapter_outline.py": 1,  # values that the adapter begins with do not matter
    "tuning/trial_bench.py": 1,  # a trial: another learning rate, and fewer steps
}


def resolved(**values: str) -> Resolved[TrainSettings]:
    flags = {**FLAGS, **{name.replace("__", "."): value for name, value in values.items()}}
    return resolve(Sources(flags={path: (path, value) for path, value in flags.items()}), TrainSettings)


def calls(*names: str) -> dict[str, int]:
    """Return how often each module outside `settings/` calls one of the functions `names` of `settle`."""
    call = re.compile(rf"(?<![\w.])(?:{'|'.join(names)})\(")
    counted: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        code = re.sub(r"def \w+\(", "", path.read_text(encoding="utf-8"))
        if "settings.settle import" in code and path.parent.name != "settings":
            counted[str(path.relative_to(PACKAGE))] += len(call.findall(code))
    return {name: number for name, number in sorted(counted.items()) if number}


def test_only_the_settings_package_changes_settings_and_knows_which_were_given() -> None:
    owners = [
        str(path.relative_to(PACKAGE))
        for path in sorted(PACKAGE.rglob("*.py"))
        if OWNED.search(path.read_text(encoding="utf-8"))
    ]
    assert owners == ["settings/settle.py"]


def test_settings_are_settled_where_a_command_does_it_and_nowhere_else() -> None:
    assert calls("settle") == SETTLES
    assert calls("with_values", "with_settings") == VARIES


def test_the_given_settings_are_those_with_an_origin() -> None:
    asked = resolved(lora__rank="8", training__seed="0")
    given = {f"{name}.{key}" for name in TrainSettings.model_fields for key in asked.given(name)}
    assert given == set(asked.origins) == {*FLAGS, "lora.rank", "training.seed"}
    assert asked.given("lora") == {"rank": 8}
    in_code = resolved_in_code(asked.settings)
    assert {path for path in all_settings() if in_code.is_given(path)} == given


def test_inferred_values_hold_unless_the_user_gave_others() -> None:
    asked = resolved(lora__rank="8")
    values: Mapping[str, object] = {"lora.rank": 4, "lora.alpha": 8, "lora.dropout": 0.0, "generate.seed": 1}
    settled = settle(asked, [InferredSettings(values=values, origin=FILE)])
    lora = settled.settings.lora
    assert (lora.rank, lora.alpha) == (8, 8.0)
    assert settled.origin_of("lora.rank").kind == "flag"
    assert settled.origin_of("lora.alpha") == FILE
    assert settled.origin_of("lora.dropout").kind == "default"  # which it agrees with
    assert not settled.is_given("lora.alpha")
    assert asked.settings.lora.alpha == 32


def test_fixed_values_override_all_and_later_ones_override_earlier() -> None:
    asked = resolved(training__micro_batch_size="8")
    fixed = InferredSettings(values={"training.micro_batch_size": 2}, origin=FILE, is_fixed=True)
    facts = [
        fixed,
        *(InferredSettings(values={"training.seed": seed}, origin=inferred_origin(seed)) for seed in (1, 2)),
    ]
    settled = settle(asked, facts)
    training = settled.settings.training
    assert (training.micro_batch_size, training.seed) == (2, 2)
    assert (settled.origin_of("training.micro_batch_size"), settled.origin_of("training.seed")) == (
        FILE,
        inferred_origin(2),
    )


def test_values_of_a_file_are_validated_but_those_of_a_foreign_adapter_are_not() -> None:
    asked = resolved()
    assert settle(asked, [InferredSettings(values={"lora.newer": 1}, origin=FILE)]) == asked  # of another version
    for values in ({"lora.rank": "many"}, {"lora.rank": 0}):
        with pytest.raises(ModelError, match=r"the settings in run\.json can't be read") as caught:
            settle(asked, [InferredSettings(values=values, origin=FILE)])
        assert caught.value.hint
    foreign = InferredSettings(
        values={"lora.rank": 9000, "lora.target_modules": ()}, origin=FILE, is_fixed=True, is_foreign=True
    )
    lora = settle(asked, [foreign]).settings.lora
    assert (lora.rank, lora.target_modules) == (9000, ())


def test_no_file_switches_on_settings_that_run_code() -> None:
    by_hand = [path for path in all_settings() if metadata_of(path).is_forbidden_in_files]
    assert by_hand
    asked = resolved()
    for is_fixed in (False, True):
        settled = settle(
            asked, [InferredSettings(values=dict.fromkeys(by_hand, True), origin=FILE, is_fixed=is_fixed)]
        )
        assert settled == asked


@pytest.mark.parametrize(
    ("asked", "positions", "length"),
    [
        ({}, None, 2048),
        ({}, 512, 512),
        ({}, 4096, 2048),
        ({"data__max_length": "1024"}, 512, 1024),
        ({"data__max_length": "2048"}, 512, 2048),
    ],
)
def test_a_length_that_was_not_asked_for_is_lowered_to_the_positions(
    asked: dict[str, str], positions: int | None, length: int
) -> None:
    before = resolved(**asked)
    assert settle(before, limit_length(before.settings, positions)).settings.data.max_length == length
