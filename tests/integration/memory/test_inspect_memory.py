"""`qlora inspect-memory` end to end: sources of a model, what is never read, and cached answers."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

from qlora_cli.cli.app import app
from qlora_cli.memory.assumptions import untraced
from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import find_gpu
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.settings.choices import Attention
from qlora_cli.settings.models import EstimateDataSettings, EstimateSettings, ModelSettings, TrainingSettings
from qlora_cli.units import MIB
from tests.conftest import RunQlora
from tests.support.models.predictions import leave_out_catalogue
from tests.support.processes.hub_server import COMMIT, Hub, Repo

SHORT = ("--max-length", "64", "--micro-batch-size", "1")
# On one GPU: those of the catalogue need further traces.
ON_GPU = ("--gpu", "RTX 4090")
# Nothing to plan and no other storage to try, which takes further traces.
UNPLANNED = (*SHORT, *ON_GPU, "--gradient-checkpointing", "on")
ONCE = (*UNPLANNED, "--quant", "nf4")


@pytest.fixture
def config(base_model: Path, tmp_path: Path) -> Path:
    """Return a directory that holds config.json alone: no weights, no tokenizer."""
    directory = tmp_path / "config-only"
    directory.mkdir()
    shutil.copy(base_model / "config.json", directory)
    return directory


@pytest.fixture
def alone(tmp_path: Path) -> dict[str, str]:
    """Return an environment with an empty prediction cache, and no GPU; there is no hub to ask in any test."""
    return {"QLORA_CACHE": str(tmp_path / "answers"), "CUDA_VISIBLE_DEVICES": ""}


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """Return the figures, which depend neither on the name of a model nor on time."""
    return {key: value for key, value in result.items() if key not in {"model", "assumptions", "estimate_seconds"}}


def test_a_directory_its_config_and_the_catalogue_need_no_weights_and_no_network(
    run_qlora: RunQlora, config: Path, alone: dict[str, str]
) -> None:
    by_directory = run_qlora("inspect-memory", config, *ONCE, "--json", env=alone)
    by_file = run_qlora("inspect-memory", config / "config.json", *ONCE, "--json", env=alone)
    assert (by_directory.code, by_file.code) == (0, 0), by_directory.stderr + by_file.stderr
    assert figures(by_directory.json) == figures(by_file.json)
    known = run_qlora("inspect-memory", "smollm2-135m", *ONCE, "--gpu", "24GiB", "--json", env=alone)
    assert known.code == 0, known.stderr
    assert known.json["num_parameters"] == 134_515_008
    components = known.json["components"]
    assert sum(components.values()) == known.json["predicted"]["process_bytes"]
    assert [fit["fits"] for fit in known.json["fits"]] == ["yes", "yes"]


def test_only_the_config_of_a_hub_id_is_fetched(
    run_qlora: RunQlora, hub: Hub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    done = run_qlora("inspect-memory", "owner/tiny", *ONCE, "--json", env={**hub_env, "QLORA_CACHE": str(tmp_path)})
    assert done.code == 0, done.stderr
    files = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert files == {"config.json"}
    pinned = ("inspect-memory", "owner/tiny", "--revision", COMMIT, *ONCE, "--json")
    again = run_qlora(*pinned, env={**hub_env, "QLORA_CACHE": str(tmp_path)})
    assert figures(again.json) == figures(done.json)


def test_an_adapter_on_the_hub_is_predicted_by_its_config(
    run_qlora: RunQlora, hub: Hub, hub_env: dict[str, str], tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "owner/tiny", "r": 4, "target_modules": ["q_proj"]}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": b"not asked for"}
    hub.repos["owner/adapter"] = Repo(commits={COMMIT: files})
    env = {**hub_env, "QLORA_CACHE": str(tmp_path)}
    done = run_qlora("inspect-memory", "owner/adapter", *ONCE, "--json", env=env)
    assert done.code == 0, done.stderr
    asked = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert asked == {"config.json", "adapter_config.json"}
    same = ("--rank", "4", "--target-modules", "q_proj")
    of_base = run_qlora("inspect-memory", "owner/tiny", *ONCE, *same, "--json", env=env)
    # A larger model is proposed for a base, and not in place of what an adapter or a run was made for.
    assert of_base.json["larger_model"] is not None
    assert {**figures(of_base.json), "larger_model": None} == figures(done.json)
    assert any("by its config alone" in assumption for assumption in done.json["assumptions"])


def test_a_run_directory_is_predicted_with_its_own_settings(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path, alone: dict[str, str]
) -> None:
    run = tmp_path / "run"
    trained = run_qlora(
        *("train", "--model", base_model, "--dataset", rows, "--output", run, "--device", "cpu", "--max-steps", "1"),
        *("--rank", "4", "--max-length", "64", "--micro-batch-size", "2", "--accept-lost"),
    )
    assert trained.code == 0, trained.stderr
    unplanned = (*ON_GPU, "--gradient-checkpointing", "on")
    of_run = run_qlora("inspect-memory", run, *unplanned, "--json", env=alone)
    assert of_run.code == 0, of_run.stderr
    same = (*unplanned, "--rank", "4", "--max-length", "64", "--micro-batch-size", "2")
    of_model = run_qlora("inspect-memory", base_model, *same, "--json", env=alone)
    assert figures(of_run.json) == {**figures(of_model.json), "larger_model": None}
    assert (
        of_run.json["num_trainable_parameters"]
        == json.loads((run / "run.json").read_text())["plan"]["num_trainable_parameters"]
    )
    wider = run_qlora("inspect-memory", run, *unplanned, "--rank", "8", "--json", env=alone)
    assert wider.json["settings"]["rank"] == "8"
    assert wider.json["settings"]["max-length"] == "64"
    of_adapter = run_qlora("inspect-memory", run / "adapter", *same, "--json", env=alone)
    own, asked = figures(of_adapter.json), figures(of_model.json)
    # The config of an adapter names its layers.
    assert own["settings"].pop("target-modules").count(",") == 6
    assert asked["settings"].pop("target-modules") == "all-linear"
    assert own == {**asked, "larger_model": None}


def test_a_run_is_predicted_from_its_record_which_can_not_grant_trust(
    run_qlora: RunQlora, base_model: Path, rows: Path, tmp_path: Path, alone: dict[str, str]
) -> None:
    base, run = shutil.copytree(base_model, tmp_path / "base"), tmp_path / "run"
    trained = run_qlora(
        *("train", "--model", base, "--dataset", rows, "--output", run, "--device", "cpu", "--max-steps", "1"),
        *("--rank", "4", "--max-length", "64", "--micro-batch-size", "2", "--accept-lost", "--quant", "none"),
        *("--eval-split", "20%"),
    )
    assert trained.code == 0, trained.stderr
    # Also for the adapter alone: it was trained on an unquantized base, and continues on one.
    for name in (run, run / "adapter", *(run / "checkpoints").glob("step-*")):
        predicted = run_qlora("inspect-memory", name, *UNPLANNED, "--json", env=alone)
        assert predicted.code == 0, predicted.stderr
        assert predicted.json["settings"]["quant"] == "none"
        assert ("evaluation" in {phase["name"] for phase in predicted.json["phases"]}) == (name == run)
    again = shutil.copytree(run, tmp_path / "copy")
    assert f"settings of the run {again}" in " ".join(
        run_qlora("inspect-memory", again, *UNPLANNED, "--json", env=alone).json["assumptions"]
    )
    record = json.loads((run / "run.json").read_text())
    record["settings"]["model"] |= {"trust_remote_code": True, "allow_pickle": True}
    (run / "run.json").write_text(json.dumps(record))
    content = json.loads((base / "config.json").read_text())
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "payload.Own", "AutoModelForCausalLM": "payload.Own"}}
    (base / "config.json").write_text(json.dumps(content))
    (base / "payload.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused = run_qlora("inspect-memory", run, *UNPLANNED, "--json", env=alone)
    assert (refused.code, (tmp_path / "ran").exists()) == (2, False), refused.stderr
    assert "its own Python code" in refused.stderr


def test_a_cached_prediction_is_the_same_and_needs_no_torch(
    run_qlora: RunQlora, config: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    first = run_qlora("inspect-memory", config, *ONCE, "--json", env=alone)
    # From here on, importing torch ends the process.
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "torch.py").write_text("raise SystemExit(99)")
    trapped = {**alone, "PYTHONPATH": str(tmp_path / "trap")}
    again = run_qlora("inspect-memory", config, *ONCE, "--json", env=trapped)
    assert again.code == 0, again.stderr
    assert figures(again.json) == figures(first.json)
    other = run_qlora("inspect-memory", config, *ONCE, "--rank", "8", "--json", env=trapped)
    assert other.code == 99  # other settings are not in the cache


def test_a_changed_config_is_predicted_again(run_qlora: RunQlora, config: Path, alone: dict[str, str]) -> None:
    first = run_qlora("inspect-memory", config, *ONCE, "--json", env=alone)
    content = json.loads((config / "config.json").read_text())
    (config / "config.json").write_text(json.dumps({**content, "intermediate_size": 2 * content["intermediate_size"]}))
    second = run_qlora("inspect-memory", config, *ONCE, "--json", env=alone)
    assert second.json["num_parameters"] > first.json["num_parameters"]


def test_predictions_that_can_not_be_cached_or_read_are_computed(
    run_qlora: RunQlora, config: Path, alone: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no directory")
    blocked = run_qlora(
        "inspect-memory", config, *ONCE, "--json", env={**alone, "QLORA_CACHE": str(tmp_path / "file")}
    )
    assert blocked.code == 0, blocked.stderr
    cached = run_qlora("inspect-memory", config, *ONCE, "--json", env=alone)
    (answer,) = (tmp_path / "answers" / "memory").glob("*.json")
    answer.write_text("{")
    recomputed = run_qlora("inspect-memory", config, *ONCE, "--json", env=alone)
    assert figures(recomputed.json) == figures(cached.json) == figures(blocked.json)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lama-3.1-8b",), "llama-3.1-8b"),
        (("no/such/path/here",), "not a hub id"),
        (("./nowhere",), "no such file or directory"),
        (("smollm2-135m", "--max-length", "100000"), "positions"),
        (("smollm2-135m", "--target-modules", "nope"), "matches no linear layer"),
        (("smollm2-135m", "--quant", "none", "--set", "quantization.quant_storage=bf16"), "no effect"),
        (("smollm2-135m", "--gpu", "RTX 9999"), "no GPU"),
        (("smollm2-135m", "--gpu", "T4", "--dtype", "bf16"), "has no bf16"),
    ],
)
def test_unknown_or_contradictory_values_are_refused_with_exit_2(
    monkeypatch: pytest.MonkeyPatch, alone: dict[str, str], arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = CliRunner().invoke(app, ["inspect-memory", *arguments], env=alone)
    assert (done.exit_code, message in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "bert"}', '{"hidden_size": 4}', '{"model_type": "x"}'])
def test_a_config_that_can_not_be_read_is_refused(tmp_path: Path, alone: dict[str, str], content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    done = CliRunner().invoke(app, ["inspect-memory", str(tmp_path / "config.json")], env=alone)
    assert done.exit_code == 2, done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_does_not_fit_ends_with_3_and_proposes_changes_that_fit(
    run_qlora: RunQlora, alone: dict[str, str]
) -> None:
    # Without checkpointing, all activations are saved: too much for 3 GiB. The part that `selective` keeps fits.
    asked = ("smollm2-135m", "--max-length", "4096", "--gradient-checkpointing", "off", "--gpu", "3GiB", "--json")
    done = run_qlora("inspect-memory", *asked, env=alone)
    assert done.code == 3, done.stderr
    first = done.json["suggestions"][0]
    assert first["flags"] == "--gradient-checkpointing selective"
    assert first["fits"] == "yes"
    changed = run_qlora(
        *("inspect-memory", "smollm2-135m", "--max-length", "4096", "--gpu", "3GiB", "--json"),
        *first["flags"].split(),
        env=alone,
    )
    assert changed.code == 0
    assert changed.json["predicted"]["process_bytes"] == first["process_bytes"]
    assert done.json["predicted"]["process_bytes"] - first["process_bytes"] == first["saved_bytes"]


@pytest.mark.parametrize(
    ("asked_for", "stored", "proposed"),
    [
        (("--quant", "int8"), {"load_in_8bit": True}, "--quant nf4"),
        (
            ("--quant", "nf4", "--no-double-quant"),
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "--double-quant",
        ),
    ],
)
def test_quantizing_a_prequantized_checkpoint_differently_is_never_proposed(
    tmp_path: Path, alone: dict[str, str], asked_for: tuple[str, ...], stored: dict[str, object], proposed: str
) -> None:
    known = find_in_catalogue("smollm2-135m")
    assert known is not None

    small = (
        "--rank",
        "8",
        "--target-modules",
        "q_proj",
        "--optimizer",
        "paged_adamw_8bit",
        "--gpu",
        "300MiB",
        "--max-length",
        "256",
        "--json",
    )

    def suggested(quantization: dict[str, object], *flags: str) -> str:
        content = {**known.config, **({"quantization_config": quantization} if quantization else {})}
        (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        done = CliRunner().invoke(app, ["inspect-memory", str(tmp_path), *small, *flags], env=alone)
        assert done.exit_code == 3, done.stderr
        (nearest,) = json.loads(done.stdout)["suggestions"]  # the nearest of all that save memory, since nothing fits
        return str(nearest["flags"])

    assert proposed in suggested({}, *asked_for)
    flags = suggested({"quant_method": "bitsandbytes", **stored})
    assert "--max-length 64" in flags
    assert "quant" not in flags


def asked(config: Path, env: dict[str, str], *flags: str) -> dict[str, Any]:
    """Return the output of the command with `flags`, run in this process for the card that it names alone."""
    command = ["inspect-memory", str(config), *ONCE, *flags, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        leave_out_catalogue(patch)
        done = CliRunner().invoke(app, command, env=env)
    assert done.exit_code == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def without_flags(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the output of the command without further flags, computed once."""
    env = {"QLORA_CACHE": str(tmp_path_factory.mktemp("answers")), "CUDA_VISIBLE_DEVICES": ""}
    return asked(base_model / "config.json", env)


@pytest.mark.parametrize(
    ("flags", "less"),
    [
        (("--quant", "none"), "quantized_weights_bytes"),
        (("--no-double-quant",), None),
        (("--rank", "4"), "adapters_bytes"),
        (("--optimizer", "adamw_8bit", "--rank", "64"), None),
        (("--target-modules", "q_proj"), "adapters_bytes"),
        (("--gradient-checkpointing", "off"), None),
        (("--attention", "eager"), None),
        (("--micro-batch-size", "2"), None),
        (("--packing", "--micro-batch-size", "2"), None),
        (("--micro-batch-tokens", "4096"), None),
        (("--num-gpus", "2"), None),
        (("--num-gpus", "2", "--strategy", "fsdp"), "quantized_weights_bytes"),
        (("--num-gpus", "2", "--link", "ethernet"), None),
        (("--dtype", "fp32"), None),
        (("--eval",), None),
        (("--optimizer", "lion_32bit"), "optimizer_bytes"),
        (("--optimizer", "adafactor"), None),
        (("--optimizer", "sgd"), None),
        (("--set", "training.loraplus_lr_ratio=16"), None),
        (("--set", "training.full_determinism=true"), "workspaces_bytes"),
    ],
)
def test_every_flag_changes_the_prediction(
    config: Path, alone: dict[str, str], without_flags: dict[str, Any], flags: tuple[str, ...], less: str | None
) -> None:
    base, changed = without_flags, asked(config, alone, *flags)
    assert (base["predicted"], base["components"], base["phases"]) != (
        changed["predicted"],
        changed["components"],
        changed["phases"],
    )
    if less is not None:
        assert changed["components"][less] < base["components"][less]


def test_a_budget_bounds_the_card_and_says_what_it_leaves_for_layers_in_16_bit(
    config: Path, alone: dict[str, str]
) -> None:
    result = asked(config, alone, "--memory-budget", "1000MiB", "--set", "quantization.skip_modules=mlp,k_proj")
    spare, (fits,) = result["spare"], result["fits"]
    assert fits["usable_bytes"] == spare["budget_bytes"] == 1000 * MIB
    assert 0 < spare["spare_bytes"] <= fits["usable_bytes"] - fits["process_high_bytes"]
    assert spare["num_layers"] == 4 * 3  # q_proj, v_proj and o_proj
    assert 0 < spare["extra_bytes"] == spare["process_bytes"] - result["predicted"]["process_bytes"]


def test_the_answer_for_several_gpus_says_what_is_of_each_and_what_of_all(config: Path, alone: dict[str, str]) -> None:
    command = ["inspect-memory", str(config), *ONCE, "--num-gpus", "4"]
    with pytest.MonkeyPatch.context() as patch:
        leave_out_catalogue(patch)
        done = CliRunner().invoke(app, command, env=alone)
    assert done.stdout.startswith("Fits 4 RTX 4090: ")
    assert " GiB each, at most " in done.stdout
    assert "The time is that of all 4 together." in done.stdout
    assert "The 4 processes of a host take " in done.stdout
    one, result = asked(config, alone), asked(config, alone, "--num-gpus", "4")
    assert result["settings"]["num-gpus"] == "4"
    assert (one["host"]["num_processes"], result["host"]["num_processes"]) == (1, 4)
    # Each reads weights by itself; the first one saves.
    assert result["predicted"]["host_bytes"] == pytest.approx(4 * one["predicted"]["host_bytes"], rel=0.05)
    assert [line for line in result["assumptions"] if line.startswith("each of 4 GPUs holds all of the model")]


def test_a_base_that_several_gpus_share_takes_less_of_each_the_more_they_are(
    config: Path, alone: dict[str, str]
) -> None:
    results = [asked(config, alone, "--num-gpus", str(number), "--strategy", "fsdp") for number in (2, 4)]
    for number, result in zip((2, 4), results, strict=True):
        assert (result["settings"]["num-gpus"], result["settings"]["strategy"]) == (str(number), "fsdp")
        assert result["sharding"]["num_gpus"] == number
        assert result["components"]["gathered_bytes"] > 0
    two, four = (result["sharding"] for result in results)
    assert two["shard_bytes"] == pytest.approx(2 * four["shard_bytes"], rel=1e-3)
    # Of twice as many bytes, half as many micro-batches gather three quarters instead of half.
    assert four["received_bytes_per_step"] == pytest.approx(0.75 * two["received_bytes_per_step"], rel=1e-3)
    slow = asked(config, alone, "--num-gpus", "2", "--strategy", "fsdp", "--link", "ethernet")
    assert slow["sharding"]["receiving_seconds"] > two["receiving_seconds"]


def test_the_report_notes_which_kernels_are_traced_as_another(config: Path, alone: dict[str, str]) -> None:
    (line,) = [line for line in asked(config, alone, "--attention", "flex_attention")["assumptions"] if "flex" in line]
    assert line in untraced(TrainingSettings(), Attention.FLEX_ATTENTION)
    traced_as_another = {attention for attention in Attention if untraced(TrainingSettings(), attention)}
    assert traced_as_another == {Attention.FLEX_ATTENTION, Attention.FLASH_ATTENTION_3}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("torch_compile", "torch.compile is not traced"),
        ("use_liger_kernel", "Liger's kernels are not traced"),
        ("full_determinism", "the smaller workspaces of cuBLAS are counted"),
    ],
)
def test_the_report_notes_what_is_not_traced(
    config: Path, alone: dict[str, str], without_flags: dict[str, Any], setting: str, expected: str
) -> None:
    assert not any(expected in line for line in without_flags["assumptions"])
    (line,) = [
        line for line in asked(config, alone, "--set", f"training.{setting}=true")["assumptions"] if expected in line
    ]
    assert line == line.strip()


@pytest.mark.parametrize(
    ("rows", "tokens", "length", "num_micro_batches"),
    [
        ((1, 16), 256, 256, 4),
        ((4, 4), 255, 255, 6),  # three whole rows each
        ((1, 16), 32, 64, 16),  # the longest row is a micro-batch of its own
        ((2, 1), 256, 128, 1),  # all rows of a step are fewer tokens
    ],
)
def test_filled_micro_batches_are_predicted_as_a_packed_row(
    config: Path, rows: tuple[int, int], tokens: int, length: int, num_micro_batches: int
) -> None:
    facts = ModelFacts(name="m", content=json.loads((config / "config.json").read_text()), path=config)

    def estimated(data: dict[str, Any], size: int, accumulation: int, **training: Any) -> Any:
        settings = EstimateSettings(
            model=ModelSettings(name="m"),
            data=EstimateDataSettings(**data),
            training=TrainingSettings(micro_batch_size=size, gradient_accumulation_steps=accumulation, **training),
        )
        return Estimator(facts).estimate(settings, find_gpu("RTX 4090"))

    filled = estimated({"max_length": 64}, *rows, micro_batch_tokens=tokens)
    assert filled == estimated({"max_length": length, "packing": True}, 1, num_micro_batches)
    assert filled != estimated({"max_length": 64}, 1, 16)


def test_a_row_that_is_alone_in_its_step_is_predicted_without_a_mask(config: Path) -> None:
    facts = ModelFacts(name="m", content=json.loads((config / "config.json").read_text()), path=config)
    peaks = []
    for tokens in (None, 256):
        settings = EstimateSettings(
            model=ModelSettings(name="m"),
            data=EstimateDataSettings(max_length=64),
            training=TrainingSettings(gradient_accumulation_steps=1, micro_batch_tokens=tokens),
        )
        peaks.append(Estimator(facts).peaks(settings, find_gpu("RTX 4090")))
    assert peaks[0] == peaks[1]


def test_noise_on_embeddings_is_traced(config: Path) -> None:
    facts = ModelFacts(name="m", content=json.loads((config / "config.json").read_text()), path=config)
    allocations = []
    for alpha in (None, 5.0):
        estimator = Estimator(facts)
        settings = EstimateSettings(
            model=ModelSettings(name="m"),
            data=EstimateDataSettings(max_length=64),
            training=TrainingSettings(neftune_noise_alpha=alpha),
        )
        passes = estimator.traced(settings, find_gpu("RTX 4090")).events.step
        allocations.append(sum(event >= 0 for event in passes.events["first forward"]))
    assert allocations[1] == allocations[0] + 2  # the noise, and the sum


# Hidden and intermediate size, layers, heads of the first LLaMA models; trained parameters with rank 64; the GPU.
LLAMA = {
    "7b": (4096, 11008, 32, 32, 159_907_840, "24GiB"),
    "13b": (5120, 13824, 40, 40, 250_347_520, "24GiB"),
    "33b": (6656, 17920, 60, 52, 487_587_840, "24GiB"),
    "65b": (8192, 22016, 80, 64, 799_539_200, "48GiB"),
}


@pytest.mark.parametrize("size", LLAMA)
def test_the_configs_of_the_paper_fit_the_gpu_that_they_name(tmp_path: Path, alone: dict[str, str], size: str) -> None:
    hidden, intermediate, layers, heads, num_trained, gpu = LLAMA[size]
    shapes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
    model = LlamaConfig(**shapes, num_attention_heads=heads, vocab_size=32_000, architectures=["LlamaForCausalLM"])
    model.save_pretrained(tmp_path)
    file = Path(__file__).parents[3] / "configs" / "paper" / f"llama-{size}.yaml"
    command = ["inspect-memory", str(tmp_path), "--config", str(file), "--gpu", gpu, "--json"]
    done = CliRunner().invoke(app, command, env=alone)
    assert done.exit_code == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["num_trainable_parameters"] == num_trained
    assert [fit["fits"] for fit in answer["fits"]] == ["yes"]
    assert f" # {answer['predicted']['process_bytes'] / 1024**3:.1f} GiB, as " in file.read_text()
