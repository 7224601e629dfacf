"""A prediction as text: it is complete, adds up as printed, and fits 80 columns."""

import re
from dataclasses import asdict, fields, replace

import pytest

from qlora_cli.cli.rendering.memory_text import (
    card_lines,
    component_lines,
    fit_lines,
    hanging,
    hundredths,
    phase_lines,
    render_memory,
    time_lines,
)
from qlora_cli.cli.rendering.memory_verdict import RECOMPUTED, verdict_lines, with_article
from qlora_cli.cli.rendering.sweep_table import render_sweep
from qlora_cli.memory.bands import process_band, verdict
from qlora_cli.memory.gpus import GPUS, Gpu, find_gpu
from qlora_cli.memory.prediction import (
    DataSummary,
    MemoryReport,
    Plan,
    PlanOption,
    RankedCard,
    RunFigures,
    Sharding,
    Solution,
)
from qlora_cli.memory.report_parts import FittingModel, LargerModel, SpareMemory
from qlora_cli.settings.choices import Checkpointing
from qlora_cli.units import GIB, MIB
from tests.support.models.predictions import (
    CATALOGUE_FITS,
    COMPONENTS,
    FIGURES,
    REPORT,
    RTX_4090,
    SOLUTIONS,
    SUGGESTIONS,
    T4,
    fit,
    grid,
    sweep_point,
)

OF_TIME = [field.name for field in fields(RunFigures) if field.default is None]
TOO_LARGE = fit(T4, round(15.2 * GIB), 16 * GIB)
FULL = replace(
    REPORT,
    fits=(TOO_LARGE, *REPORT.fits),
    suggestions=SUGGESTIONS,
    solutions=SOLUTIONS,
    sweep=grid(),
    paged_bytes=GIB // 2,
    pinned_host_bytes=GIB,
)


HOPELESS = replace(
    REPORT,
    fits=(replace(TOO_LARGE, process_bytes=19 * GIB, process_high_bytes=20 * GIB, margin_bytes=-4 * GIB),),
    suggestions=SUGGESTIONS[:1],
    fitting_model=FittingModel(
        model="qwen3-14b", num_parameters=14_768_307_200, process_bytes=12 * GIB, process_high_bytes=13 * GIB
    ),
)


DATA = DataSummary(
    name="rows.jsonl",
    num_train_rows=1200,
    num_packed_rows=None,
    num_eval_rows=None,
    num_train_tokens=340_000,
    longest_row_tokens=1987,
    num_truncated_rows=0,
    padding_share=0.1234,
    num_micro_batches=600,
)


def shown(report: MemoryReport, capsys: pytest.CaptureFixture[str]) -> str:
    """Return everything that is shown about a prediction."""
    render_memory(report, details=True)
    return capsys.readouterr().out


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("report", [REPORT, FULL, replace(REPORT, fits=CATALOGUE_FITS)])
def test_a_prediction_fits_80_columns_and_has_no_colour(
    report: MemoryReport, capsys: pytest.CaptureFixture[str], *, details: bool
) -> None:
    render_memory(report, details=details)
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert [line for line in text.splitlines() if line != line.rstrip()] == []
    assert "\x1b" not in text


def test_the_answer_comes_first_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    render_memory(REPORT, (RTX_4090,))
    text = capsys.readouterr().out
    assert text.startswith("Fits an RTX 4090: 8.3 GiB, at most 8.9, of 23.5; each layer is recomputed.\n")
    assert len(text.splitlines()) < 15
    for heading in ("Predicted peak", "What it is for", "Phases", "Where it fits", "Taken for granted"):
        assert heading not in text
        assert heading in shown(REPORT, capsys)
    assert "--details shows" in text
    assert "--details" not in shown(REPORT, capsys)


def test_each_gpu_that_was_named_has_its_answer() -> None:
    fits = (*REPORT.fits, TOO_LARGE)
    tight = replace(TOO_LARGE, fits="tight")
    size = find_gpu("24GiB")
    in_size = fit(size, round(23.46 * GIB), round(23.96 * GIB))
    assert verdict_lines(replace(REPORT, fits=fits), (RTX_4090, T4)) == [
        "Fits an RTX 4090: 8.3 GiB, at most 8.9, of 23.5; each layer is recomputed.",
        "Does not fit a T4: 15.2 GiB, at most 16.0, of 14.6, short of 0.6.",
    ]
    assert verdict_lines(replace(REPORT, fits=(tight,)), (T4,)) == [
        "May not fit a T4: 15.2 GiB, at most 16.0, of 14.6."
    ]
    # Sizes that round to the same have another decimal.
    assert verdict_lines(replace(REPORT, fits=(in_size,)), (size,)) == [
        "Fits a GPU of 24.00 GiB: 23.5 GiB, at most 23.96, of 24.00; each layer is recomputed."
    ]


def test_the_answer_for_several_gpus_is_of_each_and_says_whether_they_share_the_base() -> None:
    whole = replace(REPORT, settings={**REPORT.settings, "num-gpus": "2"})
    first, *rest = verdict_lines(whole, (RTX_4090,))
    assert first == "Fits 2 RTX 4090: 8.3 GiB each, at most 8.9, of 23.5; each layer is recomputed."
    assert rest == ["The time is that of all 2 together."]
    shard = Sharding(num_gpus=2, shard_bytes=GIB, received_bytes_per_step=GIB, link="pcie", receiving_seconds=0.1)
    host = replace(REPORT.host, num_processes=2)
    needs = replace(REPORT.predicted, host_bytes=6 * GIB)
    sharded = replace(whole, sharding=shard, host=host, predicted=needs)
    first, *rest = verdict_lines(sharded, (RTX_4090,))
    assert first == "Fits 2 RTX 4090, sharded: 8.3 GiB each, at most 8.9, of 23.5; each layer is recomputed."
    assert rest[1] == "The 2 processes of a host take 6.0 GiB of its memory."
    assert rest[2].startswith("The base is sharded: each holds 1.0 GiB of it, and receives 1.0 GiB a step over PCIe")
    kinds = {
        find_gpu("24GB"): "Fits 2 24 GB cards (RTX 3090, ",
        find_gpu("24GiB"): "Fits 2 GPUs of 24.00 GiB, sharded: ",
    }
    for gpu, begins in kinds.items():
        assert verdict_lines(replace(sharded, fits=(fit(gpu, GIB, GIB),)), (gpu,))[0].startswith(begins)
    hopeless = replace(HOPELESS, settings=whole.settings, sharding=shard)
    assert verdict_lines(hopeless, (T4,))[0].startswith("Cannot fit 2 T4, sharded: ")


@pytest.mark.parametrize(
    ("seconds", "limited_by", "expected"),
    [
        (0.5, "compute", "copies 3.0 GiB a step, 0.50 s, to the GPU, and receives 1.0 GiB a step over PCIe, 0.10 s, "),
        (None, "link", "copies 3.0 GiB a step to the GPU, and receives 1.0 GiB a step over PCIe, 0.10 s, "),
    ],
)
def test_the_answer_says_what_a_base_in_host_memory_copies(
    seconds: float | None, limited_by: str, expected: str
) -> None:
    shard = Sharding(
        num_gpus=2,
        shard_bytes=GIB,
        received_bytes_per_step=GIB,
        link="pcie",
        receiving_seconds=0.1,
        copied_bytes_per_step=3 * GIB,
        copying_seconds=seconds,
    )
    figures = replace(REPORT.predicted, limited_by=limited_by)
    report = replace(REPORT, settings={**REPORT.settings, "num-gpus": "2"}, sharding=shard, predicted=figures)
    hides = "more than" if limited_by == "link" else "hidden by"
    line = f"The base is sharded: each holds 1.0 GiB of it in host memory, {expected}together {hides} the computation."
    assert line in verdict_lines(report, (RTX_4090,))


def test_the_answer_has_the_time_of_a_step_where_it_is_known() -> None:
    timed = replace(REPORT.fits[0], step_seconds=11.413)
    run = replace(REPORT, fits=(timed, timed))
    first, second = verdict_lines(run, (RTX_4090, RTX_4090))
    assert first.endswith("; each layer is recomputed, about 11 s a step (±30%).")
    assert second.endswith("; each layer is recomputed, about 11 s a step.")
    by_host = replace(run, predicted=replace(FIGURES, limited_by="host"))
    assert ", at least 11 s a step (±30%)." in verdict_lines(by_host, (RTX_4090, RTX_4090))[0]
    for seconds, shown_seconds in ((0.654, "0.65"), (7.31, "7.3"), (1234.0, "1,234")):
        timed_again = replace(run, fits=(replace(timed, step_seconds=seconds),) * 2)
        assert f"about {shown_seconds} s a step." in verdict_lines(timed_again, (RTX_4090, RTX_4090))[1]
    missing = replace(run, fits=(replace(TOO_LARGE, step_seconds=3.0), timed))
    assert "a step" not in verdict_lines(missing, (T4, RTX_4090))[0]


@pytest.mark.parametrize("checkpointing", list(RECOMPUTED))
def test_the_answer_says_what_is_recomputed(checkpointing: Checkpointing) -> None:
    fits = (replace(REPORT.fits[0], gradient_checkpointing=checkpointing.value),)
    (line,) = verdict_lines(replace(REPORT, fits=fits), (RTX_4090,))
    assert line.endswith(f"; {RECOMPUTED[checkpointing]}.")


def test_every_kind_of_checkpointing_that_runs_is_described() -> None:
    assert {*RECOMPUTED, Checkpointing.AUTO} == set(Checkpointing)


def test_the_answer_names_what_would_make_it_fit() -> None:
    fitting = replace(SUGGESTIONS[1], fits="yes")
    for suggestions, ending in (
        ((SUGGESTIONS[0], SUGGESTIONS[1]), "; it may fit with --gradient-checkpointing on."),
        ((fitting,), "; it fits with --gradient-checkpointing on."),
    ):
        (line,) = verdict_lines(replace(REPORT, fits=(TOO_LARGE,), suggestions=suggestions), (T4,))
        assert line == f"Does not fit a T4: 15.2 GiB, at most 16.0, of 14.6, short of 0.6{ending}"


def test_a_run_that_no_change_makes_fit_is_answered_with_the_largest_model_that_would() -> None:
    parts = replace(COMPONENTS, quantized_weights_bytes=20 * GIB)
    heavy = verdict_lines(replace(HOPELESS, components=parts), (T4,))
    model = (
        "The largest model of the catalogue that fits there: qwen3-14b (14.77B parameters), 12.0 GiB, at most 13.0."
    )
    assert heavy == ["Cannot fit a T4: the weights alone take 22.1 of 14.6 GiB.", model]
    assert verdict_lines(HOPELESS, (T4,)) == [
        "Cannot fit a T4: takes 15.2 of 14.6 GiB with every change there is.",
        model,
    ]
    assert verdict_lines(replace(HOPELESS, fitting_model=None), (T4,)) == verdict_lines(HOPELESS, (T4,))[:1]


def test_what_fits_in_16_bit_too_is_part_of_the_answer() -> None:
    unquantized = PlanOption(
        gradient_checkpointing="on",
        recomputed_products=(),
        micro_batch_tokens=None,
        process_bytes=18 * GIB,
        process_high_bytes=19 * GIB,
        fits="yes",
        step_seconds=1.0,
    )
    first, *others = verdict_lines(replace(REPORT, unquantized=unquantized), (RTX_4090,))
    assert [first] == verdict_lines(REPORT, (RTX_4090,))
    assert others == [
        "In 16 bit it fits, too, without the error of quantization: with --quant none it takes 18.0 GiB, at most "
        "19.0; each layer is recomputed, about 1.0 s a step."
    ]


def test_longer_rows_that_fit_are_part_of_the_answer() -> None:
    longer = Solution(setting="max-length", gpu="RTX 4090", value=12_288, process_bytes=23 * GIB, limited_by="memory")
    assert verdict_lines(replace(REPORT, longer_rows=longer, plan=None), (RTX_4090,))[1:] == [
        "Rows of up to 12,288 tokens fit, too."
    ]
    untried = verdict_lines(replace(REPORT, longer_rows=replace(longer, limited_by=None), plan=None), (RTX_4090,))
    assert untried[1] == "Rows of up to 12,288 tokens fit, too; --solve max-length finds the longest."
    bound = replace(longer, limited_by="the positions of the model")
    assert verdict_lines(replace(REPORT, longer_rows=bound, plan=None), (RTX_4090,))[1:] == [
        "Rows of up to 12,288 tokens fit, too, the positions of the model."
    ]


def test_a_larger_model_that_fits_is_part_of_the_answer() -> None:
    larger = LargerModel(
        preset="phi-4-24gb", num_parameters=14_659_507_200, max_length_tokens=8192, process_high_bytes=18 * GIB
    )
    assert verdict_lines(replace(REPORT, larger_model=larger), (RTX_4090,))[1:] == [
        "A larger model fits, too: --preset phi-4-24gb, 14.66B parameters in nf4 and rows of up to 8,192 tokens, "
        "takes at most 18.0 GiB."
    ]


def test_times_that_runs_corrected_say_so() -> None:
    corrected = replace(FIGURES, step_seconds=1.0, step_seconds_low=0.9, step_seconds_high=1.1, tokens_per_second=2e3)
    corrected = replace(corrected, limited_by="compute", rates="data sheet", learnt_ratio=1.09, learnt_runs=3)
    said = " ".join(line.strip() for line in time_lines(corrected))
    assert said.endswith("(by rates data sheet, corrected by 3 runs here: times 1.09)")


def test_a_change_that_is_not_enough_is_a_detail(capsys: pytest.CaptureFixture[str]) -> None:
    render_memory(HOPELESS, (T4,))
    assert "What to change" not in capsys.readouterr().out
    assert "still too large" in shown(HOPELESS, capsys)


def test_without_a_gpu_the_answer_is_the_smallest_class() -> None:
    report = replace(REPORT, fits=CATALOGUE_FITS)
    takes = "Takes 8.3 GiB, at most 8.9"
    assert verdict_lines(report, ()) == [f"{takes}: fits a 10 GB card (RTX 3080 10GB) and larger ones."]
    fits = tuple(replace(fit, fits="tight") if fit.gpu == "T4" else fit for fit in CATALOGUE_FITS)
    assert verdict_lines(replace(report, fits=fits), ()) == [
        f"{takes}: fits a 10 GB card (RTX 3080 10GB) and larger ones but T4."
    ]
    assert verdict_lines(replace(report, smallest_class=None), ()) == [
        f"{takes}: fits on no class of cards in the catalogue; --gpu 4x80GB asks about several."
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("RTX 4090", "an RTX 4090"),
        ("A100 40GB", "an A100 40GB"),
        ("L4", "an L4"),
        ("T4", "a T4"),
        ("Titan RTX", "a Titan RTX"),
        ("Quadro RTX 8000", "a Quadro RTX 8000"),
        ("GH200 96GB", "a GH200 96GB"),
        ("8 GB card", "an 8 GB card"),
        ("11 GB card", "an 11 GB card"),
        ("80 GB card", "an 80 GB card"),
        ("24 GB card", "a 24 GB card"),
        ("180 GB card", "a 180 GB card"),
    ],
)
def test_a_card_has_its_article(name: str, expected: str) -> None:
    assert with_article(name) == expected


def test_the_smallest_card_is_a_class_with_common_cards_and_one_with_room(capsys: pytest.CaptureFixture[str]) -> None:
    def smallest(report: MemoryReport) -> str:
        text = " ".join(shown(report, capsys).split())
        return text.partition("smallest ")[2].partition(" Predicted peak")[0]

    with_ease = "with ease: a 12 GB card (RTX 3060 12GB, RTX 4070, RTX 5070, ...)"
    assert smallest(REPORT) == f"a 10 GB card (RTX 3080 10GB); {with_ease}"
    assert smallest(replace(REPORT, smallest_gpu="RTX 4060")).startswith(
        "a 10 GB card (RTX 3080 10GB); of 8 GB, an RTX 4060; with ease"
    )
    assert smallest(replace(REPORT, roomy_class=REPORT.smallest_class)) == "a 10 GB card (RTX 3080 10GB)"
    assert smallest(replace(REPORT, smallest_class=None, smallest_gpu=None)) == (
        "no card of the catalogue is large enough"
    )


def test_what_is_special_about_a_gpu_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = find_gpu("P100")
    render_memory(replace(REPORT, fits=(fit(gpu, 8 * GIB, 9 * GIB),)), (gpu,))
    assert "note P100 16GB: PyPI's PyTorch has no kernels" in " ".join(capsys.readouterr().out.split())


def test_a_prediction_shows_the_settings_and_three_peaks_with_their_bands(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(REPORT, capsys)
    joined = " ".join(text.split())
    assert "asked quant nf4, double-quant true, rank 16, target-modules all-linear, max-length 2048" in joined
    assert "model llama-3.1-8b, 41.94M of 8.03B parameters trained" in joined
    assert "RTX 4090 in bf16; attention: flash" in joined
    assert "allocated 7.50 GiB 7.42 to 7.58" in joined
    assert "reserved 7.90 GiB 7.43 to 8.37" in joined
    assert "process 8.35 GiB 7.88 to 8.94" in joined
    assert "  - Nothing else runs on the GPU" in text


@pytest.mark.parametrize(
    ("seconds", "spoken"),
    [(0.051, "0.051 s"), (39.4, "39 s"), (99, "99 s"), (101, "2 min"), (3590, "1 h 0 min"), (7800, "2 h 10 min")],
)
def test_the_answer_has_the_time_of_the_run_where_its_rows_are_known(seconds: float, spoken: str) -> None:
    figures = replace(
        REPORT.predicted,
        num_steps=750,
        run_seconds=seconds,
        run_seconds_low=0.75 * seconds,
        run_seconds_high=1.2 * seconds,
        run_limited_by="compute",
    )
    by_number = replace(REPORT, predicted=figures)
    (line,) = verdict_lines(by_number, (RTX_4090,))
    assert line.endswith(f"; each layer is recomputed, about {spoken} (±25%) for 750 steps.")
    (line,) = verdict_lines(replace(by_number, data=DATA), (RTX_4090,))
    assert line.endswith(f", about {spoken} (±25%) for your 1,200 rows.")
    by_host = replace(by_number, predicted=replace(figures, run_limited_by="host"))
    assert f", at least {spoken} (" in verdict_lines(by_host, (RTX_4090,))[0]


def test_a_prediction_shows_the_time_of_a_step_only_if_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    joined = " ".join(shown(REPORT, capsys).split())
    assert "about 11.41 s a step (8.56 to 14.84), 2,870 tokens/s, limited by compute (by arithmetic, not" in joined
    unknown = replace(REPORT, predicted=RunFigures(**asdict(FIGURES) | dict.fromkeys(OF_TIME)))
    assert "a step" not in shown(unknown, capsys)
    short = replace(REPORT, predicted=replace(FIGURES, step_seconds=0.0123, step_seconds_low=0.00921))
    assert "about 0.012 s a step (0.0092 to" in shown(short, capsys)
    bound = replace(REPORT, predicted=replace(FIGURES, limited_by="host"))
    joined = " ".join(shown(bound, capsys).split())
    assert "at least 11.41 s a step (8.56 to 14.84), 2,870 tokens/s, limited by the host" in joined


def test_a_run_shows_its_steps_time_cost_and_energy(capsys: pytest.CaptureFixture[str]) -> None:
    figures = replace(
        FIGURES,
        num_steps=1500,
        run_seconds=7389.0,
        run_seconds_low=5000.0,
        run_seconds_high=9000.0,
        run_limited_by="host",
        cost_low=3.0,
        cost_high=5.0,
        energy_wh=924.0,
    )
    render_memory(replace(REPORT, predicted=figures))
    joined = " ".join(capsys.readouterr().out.split())
    assert (
        "the run 1,500 steps on an RTX 4090 in 2:03:09 (1:23:20 to 2:30:00), limited by the host, 0.92 kWh" in joined
    )
    assert "1:23:20 to 2:30:00), limited by the host, 4.11 (3.00 to 5.00) at the given price, 0.92" in " ".join(
        shown(replace(REPORT, predicted=replace(figures, cost=4.105)), capsys).split()
    )


def test_the_rows_that_were_read_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    expected = "data 1,200 rows of 340,000 tokens, the longest of 1,987; 12.3% padding, micro-batches in the run: 600"
    assert expected in " ".join(shown(replace(REPORT, data=DATA), capsys).split())
    packed = replace(DATA, num_packed_rows=300, num_eval_rows=50, padding_share=0.0)
    joined = " ".join(shown(replace(REPORT, data=packed), capsys).split())
    assert "of 1,987, packed into 300 rows; 50 rows held out; 0.0% padding" in joined


def ranked_card(gpu: str, *, cost: float | None, seconds: float, num_gpus: int = 1) -> RankedCard:
    return RankedCard(
        gpu=gpu,
        num_gpus=num_gpus,
        strategy="ddp" if num_gpus == 1 else "fsdp",
        price=None if cost is None else 1.0,
        run_seconds=seconds,
        run_seconds_low=0.75 * seconds,
        run_seconds_high=1.3 * seconds,
        cost=cost,
        cost_low=None if cost is None else 0.75 * cost,
        cost_high=None if cost is None else 1.3 * cost,
        energy_wh=100.0,
        process_bytes=GIB,
        process_high_bytes=GIB,
        gradient_checkpointing="on",
        micro_batch_tokens=None,
    )


def test_the_best_cards_are_shown_with_cost_and_time_within_80_columns() -> None:
    names = ("RTX PRO 6000 Blackwell", "L4")
    priced = card_lines([ranked_card(name, cost=1234.5, seconds=99 * 3600) for name in names])
    assert [line.split()[:2] for line in priced] == [["cost", "time"], ["RTX", "PRO"], ["L4", "1,234.50"]]
    assert all(len(line) <= 80 for line in card_lines([ranked_card(names[0], cost=12.5, seconds=99 * 3600)]))
    several = card_lines([ranked_card("L4", cost=12.5, seconds=3600, num_gpus=4)])
    assert several[1].split()[:4] == ["4", "L4,", "sharded", "12.50"]
    without = card_lines([ranked_card("L4", cost=None, seconds=3600.0)])
    assert [line.split() for line in without] == [["time"], ["L4", "1:00:00", "(45:00", "to", "1:18:00)"]]
    assert card_lines([]) == ["  it fits on none of those that were asked about"]


def test_a_run_without_a_gpu_says_whose_time_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    figures = replace(FIGURES, num_steps=3, run_seconds=9.0, run_seconds_low=8.0, run_seconds_high=10.0, energy_wh=1.0)
    report = replace(REPORT, predicted=figures)
    assert "3 steps on an RTX 4090 in 9.00 s" in " ".join(shown(report, capsys).split())
    render_memory(report, [RTX_4090])
    assert "3 steps in 9.00 s" in " ".join(capsys.readouterr().out.split())
    cards = (ranked_card("L4", cost=None, seconds=60.0),)
    assert "3 steps" not in shown(replace(report, cards=cards), capsys)  # unplanned, next to what is planned


def test_what_a_run_needs_besides_the_gpu_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    figures = replace(
        FIGURES, host_bytes=3 * GIB, host_bytes_low=2 * GIB, host_bytes_high=5 * GIB, disk_bytes=GIB, download_bytes=0
    )
    joined = " ".join(shown(replace(REPORT, predicted=figures), capsys).split())
    assert "needs 3.00 GiB of host memory (2.00 to 5.00), 1.00 GiB of disk for the run smallest" in joined
    assert "the largest weights, while reading 0.98 GiB a checkpoint, while saving 0.47 GiB" in joined
    remote = replace(REPORT, predicted=replace(figures, download_bytes=15 * GIB))
    assert "disk for the run, a download of 15.00 GiB" in " ".join(shown(remote, capsys).split())


def test_paged_and_pinned_memory_is_shown_only_if_there_is_any(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("paged", "on the host"):
        assert f"  {word}" not in shown(REPORT, capsys)
        assert f"  {word}" in shown(FULL, capsys)


def test_components_add_up_as_printed() -> None:
    *parts, total = component_lines(COMPONENTS)
    sizes = [float(re.findall(r"([\d.]+) GiB", line)[0]) for line in parts]
    assert round(sum(sizes), 2) == float(re.findall(r"([\d.]+) GiB", total)[0]) == 8.35
    assert sum(asdict(COMPONENTS).values()) == FIGURES.process_bytes
    assert not any("workspaces" in line for line in parts)  # this run has none
    bars = [line.count("█") for line in parts]
    assert max(bars) == bars[0] == 30


def test_rounding_preserves_the_sum() -> None:
    thirds = [GIB // 3] * 3
    assert hundredths(thirds) in ([34, 33, 33], [33, 34, 33], [33, 33, 34])
    assert hundredths([0, GIB]) == [0, 100]
    assert sum(hundredths([7 * MIB] * 9)) == round(9 * 700 / 1024)


def test_the_phase_of_the_peak_is_marked_and_explained() -> None:
    lines = phase_lines(REPORT.phases, "backward", "Because.")
    assert [line.split()[0] for line in lines if "<- the peak" in line] == ["backward"]
    assert lines[-1] == "  Because."


def test_named_gpus_have_a_line_each() -> None:
    header, first, second = fit_lines((TOO_LARGE, *REPORT.fits))
    assert header.split() == ["takes", "at", "most", "usable", "left"]
    assert first.split() == ["T4", "no", "15.20", "16.00", "14.56", "-0.64"]
    assert second.split() == ["RTX", "4090", "yes", "8.35", "8.94", "23.52", "+15.17"]


def test_the_catalogue_is_shown_by_group_with_every_card() -> None:
    lines = fit_lines(CATALOGUE_FITS)
    assert [line.strip() for line in lines[1:] if not re.search(r"\d$", line)] == [
        "consumer",
        "workstation",
        "data-centre",
    ]
    text = "\n".join(lines)
    assert all(f"{gpu.name} " in text for gpu in GPUS)
    assert len(lines) < len(GPUS)


def test_a_table_is_marked_only_for_a_gpu_that_was_named(capsys: pytest.CaptureFixture[str]) -> None:
    render_memory(replace(FULL, fits=CATALOGUE_FITS))
    assert "!" not in capsys.readouterr().out
    render_memory(FULL, (T4, RTX_4090))
    assert "Process memory in GiB; ! does not fit on the T4, ~ is tight" in capsys.readouterr().out


def test_suggestions_name_flags_saving_and_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(FULL, capsys)
    assert "\n  --micro-batch-size 1 --gradient-accumulation-steps 32\n" in text
    joined = " ".join(text.split())
    assert "saves 2.50 GiB, then 15.20 GiB: still too large; the same batch in more passes" in joined
    assert "saves 4.20 GiB, then 13.50 GiB: fits tightly" in joined
    assert "What to change" not in shown(REPORT, capsys)


def test_solutions_show_the_value_or_that_none_fits(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(FULL, capsys)
    assert "  --max-length 13952 on the RTX 4090: 22.90 GiB; limited by memory\n" in text
    assert "  no --rank fits on the T4\n" in text


def test_a_sentence_wraps_without_breaking_flags() -> None:
    lines = hanging("word " * 14 + "--gradient-accumulation-steps 16", "  - ", "    ")
    assert len(lines) == 2
    assert lines[1] == "    --gradient-accumulation-steps 16"


# ---- sweeps


def swept(report: MemoryReport, capsys: pytest.CaptureFixture[str], gpu: Gpu | None = None) -> list[str]:
    """Return the lines of the tables of a sweep."""
    render_sweep(report, gpu)
    return capsys.readouterr().out.splitlines()


def test_two_settings_make_a_grid_that_marks_cells_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    blank, heading, *lines = swept(FULL, capsys, T4)
    assert (blank, heading) == ("", "Process memory in GiB; ! does not fit on the T4, ~ is tight")
    assert lines[0].split() == ["micro-batch-size"]
    assert lines[1].split() == ["max-length", "1", "2", "4", "8"]
    first, last = lines[2].split(), lines[8].split()
    assert first == ["512", "6.30", "6.95", "8.25", "10.85"]
    assert last[0] == "32,768"
    assert all(cell.endswith("!") for cell in last[1:])
    assert not any("!" in line for line in swept(FULL, capsys))


def test_a_grid_of_memory_is_followed_by_one_of_speed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = swept(FULL, capsys, T4)
    at = lines.index("Tokens/s on an RTX 4090, by arithmetic")
    assert lines[at + 2].split() == ["max-length", "1", "2", "4", "8"]
    assert lines[at + 3].split() == ["512", "672", "804", "891", "942"]
    assert len(lines) == 2 * (2 + 2 + 7)
    unknown = replace(FULL, sweep=tuple(replace(point, tokens_per_second=None) for point in FULL.sweep))
    assert len(swept(unknown, capsys)) == 2 + 2 + 7


def test_one_setting_makes_a_column_of_memory_and_two_of_time(capsys: pytest.CaptureFixture[str]) -> None:
    report = replace(REPORT, sweep=tuple(sweep_point(max_length=length) for length in (512, 4096)))
    assert [line.split() for line in swept(report, capsys)[2:]] == [
        ["max-length", "GiB", "s", "a", "step", "tokens/s"],
        ["512", "6.30", "0.76", "672"],
        ["4,096", "10.85", "4.35", "942"],
    ]
    unknown = [replace(point, step_seconds=None, tokens_per_second=None) for point in report.sweep]
    assert [line.split() for line in swept(replace(report, sweep=tuple(unknown)), capsys)[2:]] == [
        ["max-length", "GiB"],
        ["512", "6.30"],
        ["4,096", "10.85"],
    ]


def test_a_sweep_says_how_it_recomputes_where_the_run_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    option = PlanOption(
        gradient_checkpointing="off",
        recomputed_products=(),
        micro_batch_tokens=None,
        process_bytes=GIB,
        process_high_bytes=GIB,
        fits="yes",
        step_seconds=1.0,
    )
    heading = swept(replace(FULL, plan=Plan(chosen=option, alternatives=())), capsys)[1]
    assert heading == "Process memory in GiB with gradient checkpointing on"


def test_a_third_setting_makes_a_grid_per_value_and_many_columns_wrap(capsys: pytest.CaptureFixture[str]) -> None:
    points = tuple(
        sweep_point(max_length=length, micro_batch_size=rows, rank=rank)
        for length in range(512, 512 + 9)
        for rows in range(1, 9)
        for rank in (1, 2)
    )
    lines = swept(replace(REPORT, sweep=points), capsys)
    assert [line.strip() for line in lines if line.startswith("  rank")] == ["rank 1", "rank 2"] * 2
    assert len(lines) == 2 * (2 + 2 * (1 + 2 * (2 + 9)))
    assert max(map(len, lines)) <= 80


def test_a_swept_run_is_judged_like_the_run_itself() -> None:
    own = REPORT.predicted
    point = replace(
        sweep_point(max_length=2048),
        allocated_bytes=own.allocated_bytes,
        reserved_bytes=own.reserved_bytes,
        process_bytes=own.process_bytes,
    )
    assert process_band(REPORT, point) == (own.process_low_bytes, own.process_high_bytes)
    least = own.allocated_low_bytes + REPORT.components.context_bytes
    for usable, expected in (
        (own.process_high_bytes, "yes"),
        (own.process_high_bytes - 1, "tight"),
        (least + 1, "tight"),
        (least - 1, "no"),
        (RTX_4090.usable_bytes, "yes"),
    ):
        assert verdict(REPORT, point, usable) == expected


@pytest.mark.parametrize(
    ("spare_bytes", "says"),
    [
        (0, "The budget of 20.0 GiB leaves nothing for layers in 16 bit."),
        (3 * GIB, "leaves 3.00 GiB for layers in 16 bit; all 224 quantized layers would take 11.00 more"),
        (12 * GIB, "The budget of 20.0 GiB suffices for all 224 quantized layers in 16 bit: use --quant none."),
    ],
)
def test_what_a_budget_leaves_is_part_of_the_answer(
    spare_bytes: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spare = SpareMemory(
        budget_bytes=20 * GIB,
        spare_bytes=spare_bytes,
        process_bytes=19 * GIB,
        num_layers=224,
        extra_bytes=11 * GIB,
    )
    render_memory(replace(REPORT, fits=(fit(RTX_4090, 9 * GIB, 10 * GIB),), spare=spare), [RTX_4090])
    assert says in " ".join(capsys.readouterr().out.split())
