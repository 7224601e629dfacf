"""`qlora inspect-memory` as scripts and users see it: what is asked, what is refused, exit codes, one JSON object."""

import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType

import pytest
import typer.main
from typer.testing import CliRunner, Result

from qlora_cli.cli.app import app
from qlora_cli.cli.parsing.sweep_values import read_sweeps, read_values
from qlora_cli.events import Reporter
from qlora_cli.memory.prediction import COMPONENTS, GpuFit, MemoryReport, RunFigures
from qlora_cli.memory.request import MemoryRequest, lengths_up_to, runs_evaluation
from qlora_cli.settings.choices import Attention, Checkpointing, Quantization
from qlora_cli.settings.models import all_settings, metadata_of
from tests.conftest import ASSETS
from tests.support.models.predictions import CATALOGUE_FITS, REPORT, RTX_4090, T4, fit, sweep_point
from tests.support.processes.light_commands import LightQlora

GIB = 1024**3
TOO_LARGE = fit(T4, round(15.2 * GIB), 16 * GIB)
TIGHT = replace(TOO_LARGE, fits="tight")
Ask = Callable[..., MemoryRequest]


class Core:
    """Stands in for the prediction: records its requests and returns a fixed report, with a fit for each GPU."""

    def __init__(self) -> None:
        self.report: MemoryReport = REPORT
        self.requests: list[MemoryRequest] = []

    def inspect_memory(self, request: MemoryRequest, _: Reporter) -> MemoryReport:
        self.requests.append(request)
        if len(request.gpus) in (0, len(self.report.fits)):
            return self.report
        return replace(self.report, fits=tuple(fit(gpu, GIB, GIB) for gpu in request.gpus))


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    stand_in = Core()
    module = ModuleType("qlora_cli.memory.memory_report")
    module.inspect_memory = stand_in.inspect_memory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return stand_in


def qlora_inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect-memory", *map(str, arguments)])


@pytest.fixture
def asked(core: Core) -> Ask:
    """Run the command and return the request that the core received."""

    def ask(*arguments: str | Path) -> MemoryRequest:
        done = qlora_inspect(*arguments)
        assert done.exit_code == 0, done.output
        return core.requests[-1]

    return ask


def evaluates(request: MemoryRequest) -> bool:
    return runs_evaluation(request.asked.settings, request.prediction.evaluate)


def refused(*arguments: str | Path) -> str:
    """Return the stderr of a command that ends with exit code 2, with `--json` as well as without."""
    done = qlora_inspect(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    error = json.loads(qlora_inspect(*arguments, "--json").stdout)["error"]
    assert error["exit_code"] == 2
    assert error["hint"] or error["problems"]
    return done.stderr


# ---- what is asked


def test_a_model_alone_asks_for_a_plain_run(asked: Ask) -> None:
    request = asked("llama-3.1-8b")
    assert request.asked.settings.model.name == "llama-3.1-8b"
    assert (request.gpus, request.solve, request.sweep) == ((), (), {})
    assert (request.prediction.sdpa_backend, request.asked.settings.data.packing, evaluates(request)) == (
        "auto",
        False,
        False,
    )


def test_every_flag_reaches_the_core(asked: Ask) -> None:
    request = asked(
        *("base", "--gpu", "4090", "--gpu", "16GiB", "--sdpa-backend", "math", "--packing"),
        *("--eval", "--solve", "rank", "--solve", "max-length", "--solve", "rank", "--sweep", "rank=8..32"),
    )
    assert [gpu.name for gpu in request.gpus] == ["RTX 4090", "16.00 GiB"]
    assert (request.prediction.sdpa_backend, request.asked.settings.data.packing, evaluates(request)) == (
        "math",
        True,
        True,
    )
    assert request.solve == ("rank", "max-length")
    assert request.sweep == {"rank": (8, 16, 32)}


def test_the_flags_of_train_reach_the_core(asked: Ask) -> None:
    settings = asked(
        *("base", "--quant", "fp4", "--no-double-quant", "--dtype", "fp16", "--rank", "64", "--max-length", "4096"),
        *("--target-modules", "q_proj,v_proj", "--micro-batch-size", "4", "--gradient-checkpointing", "offload"),
        *("--attention", "eager", "--optimizer", "paged_adamw_8bit", "--gradient-accumulation-steps", "2"),
        *("--new-tokens", "<a>", "--set", "lora.dropout=0.1"),
    ).asked.settings
    assert settings.quantization.method is Quantization.FP4
    assert settings.quantization.double_quant is False
    assert settings.model.attention is Attention.EAGER
    assert settings.model.new_tokens == ("<a>",)
    assert (settings.lora.rank, settings.lora.target_modules, settings.lora.dropout) == (64, ("q_proj", "v_proj"), 0.1)
    assert settings.data.max_length == 4096
    assert settings.training.gradient_checkpointing is Checkpointing.OFFLOAD
    assert (settings.training.micro_batch_size, settings.training.gradient_accumulation_steps) == (4, 2)
    assert settings.training.optimizer.is_paged


def test_several_gpus_are_named_with_their_card(asked: Ask) -> None:
    for name in ("2x24GB", "24GB x2"):
        request = asked("base", "--gpu", name)
        assert [gpu.name for gpu in request.gpus] == ["24 GB card"]
        assert request.asked.settings.training.num_gpus == 2
    both = asked("base", "--gpu", "2xRTX 4090", "--gpu", "2x A100 40GB", "--num-gpus", "2")
    assert [gpu.name for gpu in both.gpus] == ["RTX 4090", "A100 40GB"]
    assert asked("base", "--gpu", "1x24GB").asked.settings.training.num_gpus == 1


def test_flags_that_affect_neither_memory_nor_time_do_not_exist() -> None:
    command = typer.main.get_command(app).commands["inspect-memory"]  # type: ignore[attr-defined]
    flags = {flag for parameter in command.params for flag in parameter.opts}
    missing = {"--device", "--learning-rate", "--output", "--report-to", "--alpha", "--streaming"}
    assert not missing & flags
    assert {"--max-length", "--rank", "--optimizer", "--gradient-checkpointing", "--revision"} <= flags
    assert {"--dataset", "--seed", "--sampling", "--chat-template"} <= flags  # which decide the micro-batches
    assert {metadata_of(path).flag for path in all_settings()} >= missing


def test_what_a_run_over_rows_is_predicted_from_needs_the_rows(asked: Ask) -> None:
    request = asked("base", "--rows", "1000", "--mean-tokens", "300", "--epochs", "3", "--price", "1.5")
    prediction = request.prediction
    assert (prediction.rows, prediction.mean_tokens, prediction.price) == (1000, 300, 1.5)
    assert request.asked.settings.training.epochs == 3
    for flag, value in (("--mean-tokens", "300"), ("--epochs", "3"), ("--price", "1.5")):
        assert "has no effect without --rows" in " ".join(refused("base", flag, value).split())


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--format", "text"), ("--seed", "3"), ("--sampling", "sequential"), ("--chat-template", "chatml")],
)
def test_flags_about_the_rows_need_a_data_set(core: Core, flag: str, value: str) -> None:
    assert f"error: {flag}: has no effect without --dataset" in refused("base", flag, value)
    assert core.requests == []


def test_epochs_in_a_settings_file_need_no_rows(asked: Ask, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("model: {name: base}\ntraining: {epochs: 3}\n")
    assert asked("--config", config).asked.settings.training.epochs == 3


def test_a_settings_file_of_train_is_taken_as_it_is(asked: Ask, tmp_path: Path) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(
        "model: {name: base, device: cuda}\ndata: {dataset: rows.jsonl, eval_dataset: held_out.jsonl}\n"
        "lora: {rank: 8}\ntraining: {learning_rate: 1e-4, eval_steps: 10}\noutput: {directory: run}\n"
    )
    request = asked("--config", config)
    assert (request.asked.settings.model.name, request.asked.settings.lora.rank) == ("base", 8)
    assert evaluates(request)
    assert request.rows is None  # the data that a file names is not read
    assert asked("other", "--config", config).asked.settings.model.name == "other"
    assert not evaluates(asked("--config", config, "--no-eval"))


@pytest.mark.parametrize("setting", ["data.eval_dataset=rows.jsonl", "training.eval_steps=10"])
def test_a_run_that_would_evaluate_is_predicted_with_evaluation(asked: Ask, setting: str) -> None:
    assert evaluates(asked("base", "--set", setting))


@pytest.mark.parametrize(
    "arguments",
    [
        ["base", "--sweep", "max-length=512..4096", "micro-batch-size=1..8"],  # as issues and docs write it
        ["base", "--gpu", "T4", "--sweep", "max-length=512..4096", "micro-batch-size=1..8"],
        ["base", "--sweep", "max-length=512..4096", "--sweep", "micro-batch-size=1..8"],
        ["base", "--sweep", "max-length=512..4096 micro-batch-size=1..8"],
        ["base", "max-length=512..4096", "--sweep", "micro-batch-size=1..8", "--packing"],
    ],
)
def test_sweeps_are_given_in_several_ways(asked: Ask, arguments: list[str]) -> None:
    expected = {"max-length": (512, 1024, 2048, 4096), "micro-batch-size": (1, 2, 4, 8)}
    assert asked(*arguments).sweep == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512..32768", (512, 1024, 2048, 4096, 8192, 16384, 32768)),
        ("1..6", (1, 2, 4, 6)),
        ("8..8", (8,)),
        ("8", (8,)),
        ("4,1,2,4", (1, 2, 4)),
        ("8..1", None),
        ("0..8", None),
        ("", None),
        ("1..", None),
        ("1,", None),
        ("-1", None),
        ("1.5", None),
        ("9" * 30, None),
    ],
)
def test_ranges_double_and_lists_are_sorted(text: str, expected: tuple[int, ...] | None) -> None:
    assert read_values(text) == expected


def test_all_problems_of_sweeps_are_reported() -> None:
    sweeps, problems = read_sweeps(["rank=8 rank=9", "alpha=3", "max_length=512", "max-length=4..8", "512"])
    assert sweeps["rank"] == (8,)
    assert [f"{problem} | {problem.hint}".split("For example")[0] for problem in problems] == [
        "--sweep rank=9: rank is given twice | Give all values at once, as in rank=8,16,64.",
        "--sweep alpha=3: 'alpha' can't be swept | Sweep max-length, micro-batch-size, rank.",
        "--sweep max_length=512: 'max_length' can't be swept | Did you mean max-length?",
        "--sweep max-length=4..8: max-length must be greater than or equal to 8, got 4 | ",
        "--sweep 512: expected NAME=VALUES | ",
    ]


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "MODEL: is missing"),
        (["base", "--gpu", "RTX 9090"], "--gpu: no GPU 'RTX 9090' is known; the nearest known are"),
        (["base", "--gpu", "24"], "--gpu: '24' is a size without a unit"),
        (["base", "--gpu", "28GB"], "--gpu: no card is sold with 28 GB; there are 24 GB cards"),
        (["base", "--gpu", "2x24GB", "--gpu", "24GB"], "--gpu: a run is on one number of GPUs, and several are named"),
        (
            ["base", "--gpu", "2x24GB", "--num-gpus", "4"],
            "--gpu: a run is on one number of GPUs, and several are named",
        ),
        (["base", "--gpu", "64x24GB"], "--gpu: 64 GPUs would share the 16 rows of a step, so that some have none"),
        (["base", "--gpu", "24GB", "--strategy", "fsdp"], "--strategy: one GPU holds all of the base"),
        (["base", "--gpu", "24GB", "--offload-base"], "--offload-base: one GPU holds all of the base"),
        (["base", "--gpu", "24GB", "--link", "nvlink"], "--link: one GPU sends nothing"),
        (["base", "--gpus", "2"], "no such option: --gpus\n  hint: Name the card with --gpu"),
        (["base", "--set", "inspect_memory.num_gpus=2"], "hint: It is training.num_gpus."),
        (["base", "--gpu", "MI300X"], "--gpu: 'MI300X' is an AMD GPU\n  hint: AMD GPUs are not predicted"),
        (
            ["base", "--recipe", "peft"],
            "no such option: --recipe\n  hint: Leave it out: the run of qlora train is predicted.",
        ),
        (
            ["base", "--set", "inspect_memory.recipe=peft"],
            "unknown setting 'inspect_memory.recipe'\n  hint: Leave it out: the run of qlora train is predicted.",
        ),
        (["base", "--sdpa-backend", "cudnn"], "--sdpa-backend: 'cudnn' is not one of auto, flash, efficient, math"),
        (["base", "--sdpa-backend", "flash", "--attention", "eager"], "has no effect with --attention eager"),
        (["base", "--memory-budget", "9GiB"], "--memory-budget: is what a run may take of a GPU, and none is named"),
        (["base", "--solve", "rank"], "--solve: needs a GPU to fit on\n  hint: Name one: --gpu 'RTX 4090'"),
        (["base", "--gpu", "T4", "--solve", "alpha"], "--solve: 'alpha' is not one of max-length, micro-batch-size"),
        (["base", "--sweep", "rank=8..4"], "--sweep rank=8..4: expected values such as 512..32768 (rising)"),
        (["base", "rank=8"], "rank=8: is an argument too many"),
        (["--sweep", "max-length=512", "rank=8", "base"], "MODEL: 'rank=8' is no model, but values to sweep"),
        (["base", "--solve", "gpu"], "--solve: gpu compares whole runs, and needs --rows or --dataset"),
        (["base", "--solve", "gpu", "--rows", "9", "--by", "cost"], "--by: cost needs the prices of cards"),
        (["base", "--solve", "gpu", "--rows", "9", "--gpu", "24GB"], "the speed of 24 GB card is not known"),
        (["base", "--by", "time"], "--by: has no effect without --solve gpu"),
        (["base", "--solve", "gpu", "--rows", "9", "--by", "price"], "--by: 'price' is not one of cost, time"),
        (["base", "--rank", "0"], "--rank: must be greater than or equal to 1"),
        (["base", "--config", "no.yaml"], "--config no.yaml: No such file"),
        (["base", "--dataset", "no.jsonl"], "--dataset: no data set at no.jsonl: no such file"),
        (["base", "--dataset", "no.jsonl", "--rows", "5"], "--rows: has no effect with --dataset, whose rows are"),
        (["base", "--dataset", "no.jsonl", "--mixing", "all_exhausted"], "no effect on a single data set"),
        (
            ["base", "--dataset", "no.jsonl", "--set", "data.streaming=true", "--set", "training.max_steps=5"],
            "the rows of a stream are not known before",
        ),
        (
            ["base", "--dataset", "no.jsonl", "--packing", "--longest-first"],
            "longest_first has no effect with",
        ),
        (["base", "--quant", "none", "--set", "quantization.compute_dtype=bf16"], "no effect with --quant none"),
    ],
)
def test_bad_input_is_reported_before_anything_is_asked(core: Core, arguments: list[str], expected: str) -> None:
    assert expected in refused(*arguments)
    assert core.requests == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "RTX 9090: 1",
            "prices.yaml:1: no GPU 'RTX 9090' is known; the nearest known are RTX 3090, RTX 4090, RTX 5090",
        ),
        ("L4: 1\nl4: 2", "prices.yaml:2: 'l4': the L4 has a price already"),
        ("24GB: 1", "prices.yaml:1: '24GB' names no single card"),
        ("L4: 0", "the price of the L4 must be a number above 0, got '0'"),
        ("L4: .inf", "the price of the L4 must be a number above 0, got '.inf'"),
        ("L4: [1]", "the price of the L4 must be a number above 0, got 'a list or mapping'"),
        ("- L4", "prices.yaml: has no prices"),
        ("", "prices.yaml: has no prices"),
        ("L4: {", "prices.yaml: is not valid YAML"),
        ("L4: &a 1", "prices.yaml:1: &a is an anchor or alias"),
        ("T4: 1", "--prices: has no price for L4"),
    ],
    ids=range(11),
)
def test_prices_that_cannot_be_used_are_refused(core: Core, text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(text)
    shown = refused("base", "--solve", "gpu", "--rows", "9", "--gpu", "L4", "--prices", path)
    assert expected in shown
    assert core.requests == []


def test_cards_are_ranked_by_cost_if_prices_are_given(asked: Ask, tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("rtx4090: 0.4\nNVIDIA L4: 0.3\n")
    request = asked("base", "--solve", "gpu", "--rows", "9", "--prices", path)
    assert (request.card_order, request.prices, request.solve) == ("cost", {"RTX 4090": 0.4, "L4": 0.3}, ())
    assert {gpu.name for gpu in request.ranked_gpus} == {"RTX 4090", "L4"}
    assert asked("base", "--solve", "gpu", "--rows", "9", "--prices", path, "--by", "time").card_order == "time"
    unpriced = asked("base", "--solve", "gpu", "--rows", "9")
    assert (unpriced.card_order, len(unpriced.ranked_gpus) > 50) == ("time", True)
    named = asked("base", "--solve", "gpu", "--rows", "9", "--gpu", "T4")
    assert [gpu.name for gpu in named.ranked_gpus] == ["T4"]
    assert asked("base", "--rows", "9").card_order is None


def test_all_problems_are_reported_at_once(core: Core) -> None:
    shown = refused(
        *(
            "base",
            "--rank",
            "0",
            "--gpu",
            "RTX 9090",
            "--sdpa-backend",
            "x",
            "--solve",
            "y",
            "--sweep",
            "z",
            "--set",
            "lora",
        ),
    )
    for where in ("--rank", "--gpu", "--sdpa-backend", "--solve", "--sweep z", "--set lora"):
        assert f"error: {where}: " in shown
    assert "6 problems" in shown
    assert core.requests == []


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_a_gpu_this_machine_is_its_cpu(monkeypatch: pytest.MonkeyPatch, asked: Ask, name: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    request = asked("base", "--gpu", name)
    assert [gpu.is_host for gpu in request.gpus] == [True]
    assert request.is_on_host
    assert not asked("base", "--gpu", "RTX 4090").is_on_host


@pytest.mark.parametrize(
    ("arguments", "where"),
    [
        (["--gpu", "RTX 4090"], "--gpu"),
        (["--optimizer", "paged_adamw_8bit"], "--optimizer"),
        (["--gradient-checkpointing", "offload"], "--gradient-checkpointing"),
        (["--solve", "gpu", "--rows", "100"], "--solve"),
    ],
)
def test_what_needs_a_gpu_is_refused_for_the_cpu(core: Core, arguments: list[str], where: str) -> None:
    shown = refused("base", "--gpu", "cpu", *arguments)
    assert f"{where}: " in shown
    assert core.requests == []


@pytest.mark.parametrize("arguments", [["--help"], ["base", "--gpu", "RTX 9090"], ["base", "--sweep", "rank=a"]])
def test_help_and_mistakes_are_answered_without_torch(light_qlora: LightQlora, arguments: list[str]) -> None:
    done = light_qlora("inspect-memory", *arguments)
    assert (done.code, done.heavy) == (0 if arguments == ["--help"] else 2, []), done.stderr


# ---- what is answered


@pytest.mark.parametrize(
    ("arguments", "fits", "code"),
    [
        ([], CATALOGUE_FITS, 0),  # it does not fit all of them, but none was named
        (["--gpu", "RTX 4090"], REPORT.fits, 0),
        (["--gpu", "T4"], (TIGHT,), 0),
        (["--gpu", "T4"], (TOO_LARGE,), 3),
        (["--gpu", "RTX 4090", "--gpu", "T4"], (*REPORT.fits, TOO_LARGE), 3),
    ],
)
def test_the_exit_code_says_whether_it_fits_the_gpus_that_were_named(
    core: Core, arguments: list[str], fits: tuple[GpuFit, ...], code: int
) -> None:
    assert any(fit.fits == "no" for fit in CATALOGUE_FITS)
    core.report = replace(REPORT, fits=fits)
    text, as_json = qlora_inspect("base", *arguments), qlora_inspect("base", *arguments, "--json")
    assert (text.exit_code, as_json.exit_code) == (code, code), text.output
    assert text.stdout.startswith(("Fits ", "May not fit ", "Does not fit ", "Cannot fit ") if arguments else "Takes ")
    assert as_json.stderr == ""
    if code:
        assert text.stderr == ""
    else:
        assert text.stderr.startswith("next: qlora train ")
        assert text.stderr.count("\n") == 1
    assert len(json.loads(as_json.stdout)["fits"]) == len(fits)


def test_the_parts_behind_the_answer_are_shown_when_asked_for(core: Core) -> None:
    assert core.report.assumptions
    short, long = qlora_inspect("base"), qlora_inspect("base", "--details")
    assert "What it is for" not in short.stdout
    assert "What it is for" in long.stdout
    assert qlora_inspect("base", "--json").stdout == qlora_inspect("base", "--details", "--json").stdout


def test_json_has_the_keys_that_scripts_rely_on(core: Core) -> None:
    core.report = replace(REPORT, sweep=(sweep_point(max_length=512, rank=8),))
    report = json.loads(qlora_inspect("base", "--json").stdout)
    assert set(report) == {field.name for field in fields(MemoryReport)}
    assert set(report["predicted"]) == {field.name for field in fields(RunFigures)}
    assert report["predicted"]["allocated_bytes"] == REPORT.predicted.allocated_bytes
    assert list(report["components"]) == [f"{name}_bytes" for name in COMPONENTS]
    assert sum(report["components"].values()) == report["predicted"]["process_bytes"]
    assert report["sweep"][0]["values"] == {"max-length": 512, "rank": 8}


# ---- the picture


def test_a_picture_of_a_sweep_is_written(core: Core, tmp_path: Path) -> None:
    core.report = replace(REPORT, sweep=tuple(sweep_point(max_length=length) for length in (512, 1024)))
    path = tmp_path / "memory.png"
    done = qlora_inspect("base", "--sweep", "max-length=512..1024", "--plot", path, "--json")
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"the plot is in {path}" in done.stderr
    assert json.loads(done.stdout)["sweep"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"max-length": (256, 512, 1024, 2048)}),
        (["--max-length", "32768"], {"max-length": (512, 1024, 2048, 4096, 8192, 16384, 32768)}),
        (["--sweep", "rank=8"], {"max-length": (256, 512, 1024, 2048), "rank": (8,)}),
        (["--sweep", "max-length=64"], {"max-length": (64,)}),
    ],
)
def test_a_picture_without_a_sweep_over_the_length_makes_one(
    core: Core, tmp_path: Path, arguments: list[str], expected: dict[str, tuple[int, ...]]
) -> None:
    core.report = replace(REPORT, sweep=(sweep_point(max_length=512),))
    assert qlora_inspect("base", *arguments, "--plot", tmp_path / "memory.svg").exit_code == 0
    request = core.requests[-1]
    assert request.swept(request.asked.settings) == expected


def test_a_picture_ends_at_the_positions_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real prediction: the bundled model has fewer positions than the default length."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "memory.png"
    done = qlora_inspect(ASSETS / "base", "--plot", path, "--json")
    assert done.exit_code == 0, done.output
    assert path.read_bytes().startswith(b"\x89PNG")
    positions = json.loads((ASSETS / "base" / "config.json").read_text())["max_position_embeddings"]
    lengths = [point["values"]["max-length"] for point in json.loads(done.stdout)["sweep"]]
    assert lengths == list(lengths_up_to(positions))


@pytest.mark.parametrize("longest", [8, 9, 100, 512, 3000, 32768])
def test_the_lengths_of_a_picture_rise_to_the_longest(longest: int) -> None:
    lengths = lengths_up_to(longest)
    assert lengths[-1] == longest
    assert list(lengths) == sorted(set(lengths))
    assert lengths[0] >= 8


def test_a_plot_that_cannot_be_written_is_reported_first(
    core: Core, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "unknown kind of picture '.jpg'" in refused("base", "--plot", tmp_path / "memory.jpg")
    assert "unknown kind of picture 'memory'" in refused("base", "--plot", tmp_path / "memory")
    assert "there is no directory" in refused("base", "--plot", tmp_path / "no" / "memory.png")
    (tmp_path / "folder.png").mkdir()
    assert "is a directory" in refused("base", "--plot", tmp_path / "folder.png")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "can't be written to" in refused("base", "--plot", tmp_path / "memory.png")
    assert core.requests == []


def test_the_first_gpu_named_is_the_one_that_tables_are_for(core: Core) -> None:
    core.report = replace(REPORT, fits=(TOO_LARGE, *REPORT.fits), sweep=(sweep_point(max_length=32768),))
    done = qlora_inspect("base", "--gpu", "T4", "--gpu", RTX_4090.name, "--sweep", "max-length=32768")
    assert "! does not fit on the T4" in " ".join(done.stdout.split())
