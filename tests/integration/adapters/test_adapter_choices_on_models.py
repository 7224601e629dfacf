"""Adapter settings on real models in 4 bit: each takes effect, trains and loads again, or is refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.writer import save_adapter
from qlora_cli.errors import ModelError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.training.train_run import train
from tests.conftest import Recorder, train_settings
from tests.support.models.adapters import adapt, assert_loads_again, frozen, lora_layers, settings_of, train_steps
from tests.support.models.experts import save_moe
from tests.support.models.loading import load, logits, save_model
from tests.support.models.reference_models import IDS, ROWS, dequantized

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_moe(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


def refusal(checkpoint: Path, **lora: object) -> str:
    """Return message and hint of the error that refuses an adapter."""
    with pytest.raises(ModelError) as caught:
        attach_adapter(load(checkpoint).base, settings_of(**lora))
    return f"{caught.value} | {caught.value.hint}"


# ---- ranks and scales


def test_a_pattern_has_its_effect_in_any_order_of_its_keys_even_after_loading(llama: Path, tmp_path: Path) -> None:
    """PEFT takes the first key that matches and sorts keys when saving: here the longer one would come last."""
    for number, pattern in enumerate(
        ({"down_proj": 4, "layers.0.mlp.down_proj": 2}, {"layers.0.mlp.down_proj": 2, "down_proj": 4})
    ):
        model = adapt(llama, settings_of(rank_pattern=pattern))
        ranks = {name: layer.r["default"] for name, layer in lora_layers(model).items() if "down" in name}
        assert ranks == {"model.layers.0.mlp.down_proj": 2, "model.layers.1.mlp.down_proj": 4}
        train_steps(model)
        assert_loads_again(model, llama, tmp_path / str(number))


def test_patterns_apply_to_fused_experts_too(qwen3_moe: Path, tmp_path: Path) -> None:
    model = adapt(
        qwen3_moe,
        settings_of(
            target_parameters="all-experts", rank_pattern={"gate_up_proj": 4}, alpha_pattern={"experts.down_proj": 64}
        ),
    )
    wrappers = {
        name.rpartition(".")[2]: layer for name, layer in lora_layers(model).items() if isinstance(layer, ParamWrapper)
    }
    assert {name: (layer.r["default"], layer.scaling["default"]) for name, layer in wrappers.items()} == {
        "gate_up_proj": (4, 8),
        "down_proj": (8, 8),
    }
    losses = train_steps(model, learning_rate=5e-3)
    assert losses[0] > losses[1] > losses[2]
    assert_loads_again(model, qwen3_moe, tmp_path)


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern"])
def test_a_key_without_an_effect_is_refused_with_the_available_names(llama: Path, setting: str) -> None:
    message = refusal(llama, **{setting: {"c_attn": 4}})
    assert message.startswith(f"lora.{setting}: 'c_attn' matches no adapted layer | Adapted are down_proj, gate_proj")
    assert "lm_head" in refusal(llama, **{setting: {"lm_head": 4}})
    assert "'q_proj' matches no adapted layer" in refusal(
        llama, target_modules=("k_proj",), **{setting: {"q_proj": 4}}
    )
    assert "longer keys apply to all its layers" in refusal(llama, **{setting: {"q_proj": 4, "self_attn.q_proj": 8}})
    assert "'.*proj' matches no" in refusal(llama, **{setting: {".*proj": 4}})


# ---- DoRA


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2", "bamba"])
def test_dora_trains_magnitudes_and_loads_again(family: str, quantization: str, tmp_path: Path) -> None:
    checkpoint = save_model(tmp_path / "base", family, vocab_size=ROWS)
    lora, how = settings_of(use_dora=True), {"quantization__method": quantization}
    before = logits(load(checkpoint, **how).base, IDS)
    model = adapt(checkpoint, lora, **how)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)  # B is zero
    magnitudes = {name: p.detach().clone() for name, p in model.named_parameters() if "magnitude" in name}
    assert len(magnitudes) == len(lora_layers(model))
    losses = train_steps(model, learning_rate=1e-3)
    assert losses[0] > losses[1] > losses[2]
    assert all(not torch.equal(model.get_parameter(name), first) for name, first in magnitudes.items())
    assert all(model.get_parameter(name).dtype == torch.float32 for name in magnitudes)
    assert_loads_again(model, checkpoint, tmp_path / "adapter", **how)


@pytest.mark.fast
def test_dora_computes_what_its_paper_says(llama: Path) -> None:
    """W' = m (W + s B A) / |W + s B A|, by rows of (out, in) (arXiv 2402.09353, equation 5)."""
    model = adapt(llama, settings_of(use_dora=True, target_modules=("q_proj",)))
    train_steps(model, learning_rate=1e-2)
    plainly = dequantized(llama, load(llama))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            weight = plainly.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            moved = weight + update
            weight.copy_(
                layer.lora_magnitude_vector["default"].weight[:, None] * moved / moved.norm(dim=1, keepdim=True)
            )
    torch.testing.assert_close(logits(model, IDS), logits(plainly, IDS), rtol=1e-4, atol=1e-4)


def test_dora_leaves_the_base_unchanged(llama: Path) -> None:
    model = adapt(llama, settings_of(use_dora=True))
    before = {name: p.clone() for name, p in frozen(model).items()}
    train_steps(model)
    assert all(torch.equal(p, before[name]) for name, p in frozen(model).items())


def test_dora_on_an_8_bit_base_on_a_cpu_is_refused_because_peft_loses_its_scales(llama: Path) -> None:
    base = load(llama, quantization__method="int8").base
    with pytest.raises(ModelError, match="8-bit base that is on a CPU"):
        attach_adapter(base, settings_of(use_dora=True))
    by_peft_alone = get_peft_model(base, LoraConfig(r=8, target_modules=["q_proj"], use_dora=True))
    with torch.no_grad():
        by_peft_alone(input_ids=IDS)
        with pytest.raises(AttributeError):  # when this fails, PEFT has fixed it
            by_peft_alone(input_ids=IDS)


def test_dora_on_fused_experts_is_refused(qwen3_moe: Path) -> None:
    message = refusal(qwen3_moe, use_dora=True, target_parameters="all-experts")
    assert "lora.use_dora: can't be applied to fused experts" in message
    assert "or lora.target_parameters out" in message
    assert len(lora_layers(adapt(qwen3_moe, settings_of(use_dora=True)))) == 8  # only the attention of its two layers


# ---- elsewhere


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 4}}])
def test_the_adapter_does_the_same_in_plain_peft_on_the_dequantized_weights(
    llama: Path, tmp_path: Path, lora: dict[str, object]
) -> None:
    model = adapt(llama, settings_of(**lora))
    train_steps(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert all(config[key] == value for key, value in lora.items())
    other = PeftModel.from_pretrained(dequantized(llama, load(llama)), tmp_path)
    torch.testing.assert_close(logits(other, IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)


# ---- in training

CHOICES: dict[str, dict[str, object]] = {
    "rank_pattern": {"rank_pattern": {"q_proj": 4}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 4.0}},
    "use_rslora": {"use_rslora": True},
    "use_dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "loftq": {"init_lora_weights": "loftq"},
    "modules_to_save": {"modules_to_save": ["norm"]},
}


def losses_of_a_run(base: Path, rows: Path, output: Path, lora: dict[str, object]) -> list[float]:
    """Return the losses logged in a run of three steps."""
    flags = {f"lora__{name}": value for name, value in lora.items()}
    train(train_settings(base, rows, output, **flags), Recorder())
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["event"] == "step_done"]


def test_each_choice_changes_what_a_run_learns(llama: Path, rows: Path, tmp_path: Path) -> None:
    """The loss of the first step is that of the initial values, the loss of the third that of what was learnt."""
    plain = losses_of_a_run(llama, rows, tmp_path / "plain", {})
    losses_with = {name: losses_of_a_run(llama, rows, tmp_path / name, lora) for name, lora in CHOICES.items()}
    assert len(plain) == 3
    for name, losses in losses_with.items():
        assert losses[2] != plain[2], name
        assert (losses[0] == pytest.approx(plain[0], abs=1e-5)) == (name != "loftq"), name


def test_an_adapter_continues_to_train_unchanged_and_the_run_records_how(
    llama: Path, rows: Path, tmp_path: Path
) -> None:
    lora = {
        "rank": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"k_proj": 3.0},
        "use_rslora": True,
        "use_dora": True,
        "modules_to_save": ["lm_head", "norm"],
    }
    losses_of_a_run(llama, rows, tmp_path / "first", lora)
    own = {**lora, "target_modules": "all-linear"}  # as the run's settings write it, unlike its adapter's config
    losses_of_a_run(tmp_path / "first" / "adapter", rows, tmp_path / "second", own)
    for key, value in {"rank": 5, "target_modules": "q_proj", "modules_to_save": "lm_head"}.items():
        with pytest.raises(ModelError, match=rf"lora\.{key} can't be changed"):
            losses_of_a_run(tmp_path / "first" / "adapter", rows, tmp_path / "third", {**own, key: value})
    record = json.loads((tmp_path / "second" / "run.json").read_text(encoding="utf-8"))
    recorded = record["settings"]["lora"]
    assert recorded["modules_to_save"] == ["lm_head", "model.norm"]
    assert {key: recorded[key] for key in lora if key != "modules_to_save"} == {
        key: value for key, value in lora.items() if key != "modules_to_save"
    }
    assert recorded["init_lora_weights"] == "default"
    assert record["origins"]["lora.target_modules"].endswith(ADAPTER_CONFIG)
    first, second = (load_file(tmp_path / name / "adapter" / ADAPTER_WEIGHTS) for name in ("first", "second"))
    assert {key: value.shape for key, value in first.items()} == {key: value.shape for key, value in second.items()}
    assert all(not torch.equal(first[key], second[key]) for key in first)


def test_one_settings_file_continues_to_train_an_adapter_repeatedly(llama: Path, rows: Path, tmp_path: Path) -> None:
    """The file differs from the record of a run that continued: a doubled rank, names of modules."""
    own: dict[str, object] = {
        "quantization__method": "none",
        "model__new_tokens": "<a1>,<a2>",
        "training__max_steps": 1,
        "lora__rank": 2,
        "lora__init_lora_weights": "pissa",
        "lora__target_modules": "all-linear",
    }
    base = llama
    for name in ("first", "second", "third"):
        train(train_settings(base, rows, tmp_path / name, **own), Recorder())
        base = tmp_path / name
    for key, value, message in (
        ("model__new_tokens", "<a1>", "rows of --new-tokens"),
        ("lora__rank", 3, r"lora\.rank can't be changed"),
    ):
        with pytest.raises(ModelError, match=message):
            train(train_settings(base, rows, tmp_path / "fourth", **{**own, key: value}), Recorder())
    (tmp_path / "second").rename(tmp_path / "elsewhere")
    again = Recorder()
    done = train(train_settings(tmp_path / "second", rows, tmp_path / "third", **own), again)
    assert done.steps == 1
    assert any("nothing is left to train" in str(event) for event in again.events)
