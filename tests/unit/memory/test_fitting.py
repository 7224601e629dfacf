"""Verdicts at their limits, and suggestions: their order and savings, and that their flags give what was predicted."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from qlora_cli.errors import ModelError
from qlora_cli.memory.fitting.suggestions import MAX_SUGGESTIONS, judge_fit, suggest
from qlora_cli.memory.gpus import Gpu
from qlora_cli.memory.prediction import COMPONENTS, Components, Estimate, Figures, GpuFit, Suggestion
from qlora_cli.settings.choices import Quantization
from qlora_cli.settings.display import flags_of, is_switch
from qlora_cli.settings.models import EstimateSettings, all_settings, field_of, metadata_of
from qlora_cli.settings.resolve import Sources, resolve
from qlora_cli.units import GIB, MIB

MAX_PREDICTIONS = 20
CONTEXT = GIB // 2


def card(total_bytes: int, *, name: str = "card", group: str = "consumer") -> Gpu:
    return Gpu(
        name=name,
        group=group,
        total_bytes=total_bytes,
        capability=(8, 9),
        num_sms=100,
        context_bytes=CONTEXT,
        context_high_bytes=CONTEXT,
    )


def estimate(process: int, *, low: int = 0, high: int = 0, gpu: str = "card", checkpointing: str = "on") -> Estimate:
    """Return an estimate of a process of these bytes: `low` of allocated memory, `high` of the process."""
    figures = Figures(
        allocated_bytes=low,
        allocated_low_bytes=low,
        allocated_high_bytes=low,
        reserved_bytes=process - CONTEXT,
        reserved_low_bytes=process - CONTEXT,
        reserved_high_bytes=process - CONTEXT,
        process_bytes=process,
        process_low_bytes=process,
        process_high_bytes=high or process,
    )
    return Estimate(
        gpu=gpu,
        dtype="bf16",
        attention_backends=(),
        gradient_checkpointing=checkpointing,
        predicted=figures,
        components=Components(**{**{f"{name}_bytes": 0 for name in COMPONENTS}, "context_bytes": CONTEXT}),
        phases=(),
        paged_bytes=0,
        pinned_host_bytes=0,
        ruling_phase="backward",
        reason="",
    )


@pytest.mark.parametrize(
    ("usable", "verdict"),
    [
        (22 * GIB, "yes"),
        (22 * GIB - 1, "tight"),
        (20 * GIB, "tight"),
        (17 * GIB + CONTEXT, "tight"),
        (17 * GIB + CONTEXT - 1, "no"),
    ],
)
def test_a_verdict_changes_at_the_limits_of_the_error_band(usable: int, verdict: str) -> None:
    fit = judge_fit(estimate(20 * GIB, low=17 * GIB, high=22 * GIB), card(usable))
    assert fit == GpuFit(
        gpu="card",
        group="consumer",
        fits=verdict,
        usable_bytes=usable,
        process_bytes=20 * GIB,
        process_high_bytes=22 * GIB,
        margin_bytes=usable - 20 * GIB,
        gradient_checkpointing="on",
    )


def test_an_estimate_for_another_gpu_cannot_be_judged() -> None:
    with pytest.raises(AssertionError, match="an estimate for T4, judged on card"):
        judge_fit(estimate(GIB, gpu="T4"), card(GIB))


def settings_of(**given: Any) -> EstimateSettings:
    """Return settings by `section__key`."""
    sections: dict[str, dict[str, Any]] = {"model": {"name": "m"}}
    for path, value in given.items():
        section, key = path.split("__")
        sections.setdefault(section, {})[key] = value
    return EstimateSettings.model_validate(sections)


BITS = {Quantization.NONE: 16.0, Quantization.INT8: 8.0, Quantization.NF4: 4.5, Quantization.FP4: 4.5}


def effective_checkpointing(settings: EstimateSettings) -> str:
    asked = settings.training.gradient_checkpointing.value
    return "on" if asked == "auto" else asked


def process_bytes(settings: EstimateSettings) -> int:
    """Return roughly the memory of a run of an 8B model, on which every change has an effect."""
    quantization, lora, training = settings.quantization, settings.lora, settings.training
    is_nested = quantization.has_effect("double_quant") and quantization.double_quant
    bits = BITS[quantization.method] - (0.37 if is_nested else 0)
    modules = 4 if "q_proj" in lora.target_modules else 7
    num_trained = lora.rank * modules * 400_000
    of_state = {"adamw_8bit": 2, "paged_adamw_8bit": 0, "paged_adamw_32bit": 0, "lion_32bit": 4, "lion_8bit": 1}
    optimizer_bytes = {**of_state, "paged_lion_8bit": 0}.get(training.optimizer, 8)
    length = settings.data.max_length
    each = {"off": 1536 * 1024, "selective": 1024 * 1024, "on": 256 * 1024, "offload": 64 * 1024}[
        effective_checkpointing(settings)
    ]
    attention = length * 64 if settings.model.attention == "eager" else 0
    tokens = max(length, training.micro_batch_tokens or training.micro_batch_size * length)
    activations = tokens * (each + 512 * 1024 + modules * 4096 + attention)
    return int(8e9 * bits / 8) + num_trained * (8 + optimizer_bytes) + activations + CONTEXT


class Asker:
    """Predicts with a closed form, records the settings, and refuses those for which `refuses` is true."""

    def __init__(self, refuses: Callable[[EstimateSettings], bool] = lambda _: False) -> None:
        self.asked: list[EstimateSettings] = []
        self._refuses = refuses

    def __call__(self, settings: EstimateSettings, gpu: Gpu) -> Estimate:
        self.asked.append(settings)
        if self._refuses(settings):
            raise ModelError("not with this model")
        process = process_bytes(settings)
        checkpointing = effective_checkpointing(settings)
        high = process * 21 // 20
        return estimate(process, low=process - 2 * CONTEXT, high=high, gpu=gpu.name, checkpointing=checkpointing)


def suggestions_for(settings: EstimateSettings, gpu: Gpu, asker: Asker) -> tuple[Suggestion, ...]:
    """Return the suggestions, after checks that apply to all: each states what predicting with its flags gives."""
    base = Asker()(settings, gpu)
    suggested = suggest(settings, gpu, asker, base)
    assert len(asker.asked) <= MAX_PREDICTIONS
    assert len({changed.model_dump_json() for changed in asker.asked}) == len(asker.asked), "asked twice"
    for suggestion in suggested:
        changed = with_flags(settings, suggestion.flags)
        assert changed in asker.asked
        assert suggestion.process_bytes == process_bytes(changed)
        assert suggestion.saved_bytes == process_bytes(settings) - process_bytes(changed) >= MIB
        assert suggestion.fits == judge_fit(Asker()(changed, gpu), gpu).fits
        assert suggestion.effect
    return suggested


def with_flags(settings: EstimateSettings, text: str) -> EstimateSettings:
    """Return the settings with these flags, as the command line reads them."""
    paths = {
        metadata_of(path).flag: path for path in all_settings() if path.split(".")[0] in EstimateSettings.model_fields
    }
    flags: dict[str, tuple[str, Any]] = {}
    words = text.split()
    while words:
        flag = words.pop(0)
        flags[paths[flag]] = (flag, True if is_switch(field_of(paths[flag])) else words.pop(0))
    read = resolve(Sources(flags={"model.name": ("MODEL", "m"), **flags}), EstimateSettings).settings
    dumped, given = settings.model_dump(), read.model_dump()
    for path in flags:
        section, key = path.split(".")
        dumped[section][key] = given[section][key]
    return EstimateSettings.model_validate(dumped)


def flags_in(suggestions: tuple[Suggestion, ...]) -> list[str]:
    return [suggestion.flags for suggestion in suggestions]


FULL = settings_of(
    training__gradient_checkpointing="off",
    training__micro_batch_size=8,
    training__gradient_accumulation_steps=4,
    quantization__double_quant=False,
    model__attention="eager",
    lora__rank=64,
    data__max_length=1500,
)


def test_a_run_that_fits_gets_no_suggestion_and_no_prediction() -> None:
    asker = Asker()
    assert suggestions_for(FULL, card(80 * GIB), asker) == ()
    assert not asker.asked


def test_single_changes_that_fit_come_in_the_order_of_their_cost() -> None:
    needed = process_bytes(FULL) * 21 // 20
    suggested = suggestions_for(FULL, card(needed - 8 * MIB), Asker())
    assert flags_in(suggested) == [
        "--gradient-checkpointing selective",
        "--micro-batch-size 4 --gradient-accumulation-steps 8",
        "--double-quant",
        "--optimizer adamw_8bit",
        "--gradient-checkpointing offload",
        "--attention auto",
    ]
    assert len(suggested) == MAX_SUGGESTIONS
    assert {suggestion.fits for suggestion in suggested} == {"yes"}


def test_filled_micro_batches_get_fewer_tokens_down_to_the_longest_row() -> None:
    settings = settings_of(
        training__micro_batch_tokens=16384, training__gradient_checkpointing="on", data__max_length=4096
    )
    needed = process_bytes(settings) * 21 // 20
    assert flags_in(suggestions_for(settings, card(needed - 8 * MIB), Asker()))[0] == "--micro-batch-tokens 8192"
    least = process_bytes(with_flags(settings, "--micro-batch-tokens 4096")) * 21 // 20
    suggested = flags_in(suggestions_for(settings, card(least + 8 * MIB), Asker()))
    assert suggested[0] == "--micro-batch-tokens 4096"
    assert not any("--micro-batch-size" in flags for flags in suggested)


def test_lion_is_only_replaced_by_lion() -> None:
    settings = settings_of(training__optimizer="lion_32bit", training__gradient_checkpointing="on")
    suggested = flags_in(suggestions_for(settings, card(process_bytes(settings) * 21 // 20 - 8 * MIB), Asker()))
    assert [flags for flags in suggested if "--optimizer" in flags] == ["--optimizer lion_8bit"]


def test_later_changes_are_suggested_if_earlier_ones_have_no_effect() -> None:
    settings = settings_of(training__optimizer="paged_adamw_8bit", lora__rank=32, data__max_length=4096)
    suggested = suggestions_for(settings, card(process_bytes(settings) * 21 // 20 - 8 * MIB), Asker())
    assert flags_in(suggested) == [
        "--gradient-checkpointing offload",
        "--rank 16",
        "--max-length 4032",
        "--target-modules q_proj,k_proj,v_proj,o_proj",
    ]
    assert suggested[2].effect == "rows beyond 4,032 tokens are truncated"


def test_a_change_is_no_larger_than_necessary() -> None:
    settings = settings_of(training__micro_batch_size=16, training__gradient_accumulation_steps=3)
    for micro in (8, 4, 2, 1):
        changed = settings_of(training__micro_batch_size=micro)
        suggested = suggestions_for(settings, card(process_bytes(changed) * 21 // 20), Asker())
        assert f"--micro-batch-size {micro} --gradient-accumulation-steps {48 // micro}" in flags_in(suggested)


def test_the_batch_stays_the_same_if_halves_are_not_divisors() -> None:
    settings = settings_of(training__micro_batch_size=5, training__gradient_accumulation_steps=3)
    suggested = suggestions_for(settings, card(process_bytes(settings) * 21 // 20 - MIB), Asker())
    assert flags_in(suggested)[0] == "--micro-batch-size 1 --gradient-accumulation-steps 15"


def test_the_suggested_length_is_the_largest_that_fits() -> None:
    settings = settings_of(data__max_length=16384)
    gpu = card(12 * GIB)
    flags = flags_in(suggestions_for(settings, gpu, Asker()))[-1]
    assert flags.startswith("--max-length")
    length = int(flags.split()[1])
    assert length % 64 == 0
    fits = [
        process_bytes(settings_of(data__max_length=n)) * 21 // 20 <= gpu.usable_bytes for n in (length, length + 64)
    ]
    assert fits == [True, False]


@pytest.mark.parametrize(("method", "flags"), [("none", "--quant int8"), ("int8", "--quant nf4")])
def test_weights_get_no_fewer_bits_than_necessary(method: str, flags: str) -> None:
    settings = settings_of(quantization__method=method)
    assert flags in flags_in(suggestions_for(settings, card(process_bytes(settings) * 21 // 20 - GIB), Asker()))


def test_a_combination_comes_after_its_parts() -> None:
    gpu = card(7 * GIB)
    suggested = suggestions_for(FULL, gpu, Asker())
    *singles, combination = suggested
    assert {suggestion.fits for suggestion in singles} == {"no"}
    assert combination.fits == "yes"
    assert combination.flags.startswith("--micro-batch-size")
    words = combination.flags.split()
    for single in singles:
        assert set(single.flags.split()) <= set(words)
    assert sum(len(single.flags.split()) for single in singles) == len(words)
    assert combination.effect == "; ".join(single.effect for single in singles)
    # Offload replaces plain checkpointing.
    assert words.count("--gradient-checkpointing") == 1
    # A change that costs more than needed is not made.
    assert "--max-length" not in words


def test_a_combination_is_no_larger_than_necessary() -> None:
    settings = settings_of(training__gradient_checkpointing="off", training__micro_batch_size=8, data__max_length=64)
    changed = settings_of(training__micro_batch_size=2, data__max_length=64)
    suggested = suggestions_for(settings, card(process_bytes(changed) * 21 // 20), Asker())
    assert flags_in(suggested) == [
        "--gradient-checkpointing on",
        "--micro-batch-size 2 --gradient-accumulation-steps 64",
        "--gradient-checkpointing on --micro-batch-size 2 --gradient-accumulation-steps 64",
    ]


def test_changes_that_do_not_alter_the_result_come_before_a_single_one_that_does() -> None:
    settings = settings_of(training__gradient_checkpointing="off", training__micro_batch_size=8)
    changed = settings_of(training__micro_batch_size=2)
    suggested = suggestions_for(settings, card(process_bytes(changed) * 21 // 20), Asker())
    assert flags_in(suggested) == [
        "--gradient-checkpointing on --micro-batch-size 2 --gradient-accumulation-steps 64",
        "--max-length 192",
    ]


def test_a_harder_change_is_smaller_with_those_that_do_not_alter_the_result() -> None:
    settings = settings_of(data__max_length=8192, training__micro_batch_size=4)
    combination, alone = suggestions_for(settings, card(8 * GIB), Asker())
    assert flags_in((alone,)) == ["--max-length 832"]
    assert combination.flags.startswith("--micro-batch-size 1 --gradient-accumulation-steps 64 ")
    assert int(combination.flags.split()[-1]) > 4 * 832


def test_changes_that_are_refused_together_are_suggested_alone() -> None:
    def refuses(settings: EstimateSettings) -> bool:
        return settings.data.max_length < 8192 and settings.training.micro_batch_size == 1

    settings = settings_of(data__max_length=8192, training__micro_batch_size=2, training__optimizer="paged_adamw_8bit")
    suggested = suggestions_for(settings, card(6 * GIB), Asker(refuses))
    assert all("--micro-batch-size" not in flags for flags in flags_in(suggested) if "--max-length" in flags)
    assert any("--max-length" in flags for flags in flags_in(suggested))


def test_a_harder_change_that_is_needed_anyway_is_suggested_alone() -> None:
    suggested = suggestions_for(settings_of(quantization__method="none"), card(12 * GIB), Asker())
    assert flags_in(suggested) == ["--quant int8"]


def test_if_nothing_fits_the_nearest_combination_shows_how_far_it_is() -> None:
    (nearest,) = suggestions_for(FULL, card(7 * GIB // 2), Asker())
    assert nearest.fits == "no"
    for flag in ("--micro-batch-size 1", "--double-quant", "--gradient-checkpointing offload", "--max-length 64"):
        assert flag in nearest.flags


def test_a_refused_change_is_skipped_alone_and_in_combinations() -> None:
    def refuses(settings: EstimateSettings) -> bool:
        both = settings.quantization.double_quant and settings.training.micro_batch_size == 1
        return settings.lora.target_modules != "all-linear" or "8bit" in settings.training.optimizer or both

    gpu = card(process_bytes(FULL) * 21 // 20 - 8 * MIB)
    assert not [flags for flags in flags_in(suggestions_for(FULL, gpu, Asker(refuses))) if "--optimizer" in flags]
    (nearest,) = suggestions_for(FULL, card(7 * GIB // 2), Asker(refuses))
    for flag in ("--optimizer", "--target-modules", "--double-quant"):
        assert flag not in nearest.flags


def test_no_suggestion_is_made_if_every_change_is_refused() -> None:
    assert suggestions_for(FULL, card(7 * GIB), Asker(lambda _: True)) == ()


def test_a_change_that_saves_nothing_is_not_suggested() -> None:
    settings = settings_of(training__optimizer="paged_adamw_32bit", data__max_length=64, lora__rank=8)
    suggested = suggestions_for(settings, card(process_bytes(settings) * 21 // 20 - MIB), Asker())
    assert flags_in(suggested) == ["--gradient-checkpointing offload", "--target-modules q_proj,k_proj,v_proj,o_proj"]


@pytest.mark.parametrize("usable_gib", [3, 5, 6, 7, 8, 10, 12, 16, 24])
def test_suggestions_are_correct_for_many_runs_with_few_predictions(usable_gib: int) -> None:
    grid = product(
        ("auto", "off", "selective", "offload"), (1, 6, 64), ("nf4", "int8", "none"), (2048, 32768), (8, 128)
    )
    for checkpointing, micro, method, length, rank in grid:
        settings = settings_of(
            training__gradient_checkpointing=checkpointing,
            training__micro_batch_size=micro,
            quantization__method=method,
            data__max_length=length,
            lora__rank=rank,
        )
        suggested = suggestions_for(settings, card(usable_gib * GIB), Asker())
        assert len([suggestion for suggestion in suggested if suggestion.fits == "yes"]) in range(MAX_SUGGESTIONS + 1)


def test_a_tuple_and_a_switch_are_written_as_the_command_line_reads_them() -> None:
    assert flags_of({"lora.target_modules": ("a", "b"), "quantization.double_quant": True, "lora.rank": 8}) == (
        "--target-modules a,b --double-quant --rank 8"
    )
