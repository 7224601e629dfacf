"""Initialization of adapters: each choice gives other initial values, and PiSSA and LoftQ do what they promise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from qlora_cli.adapters.adapter import attach_adapter
from qlora_cli.adapters.initialization import as_trained, initialize
from qlora_cli.adapters.targets import adapted_layers, target_modules
from qlora_cli.adapters.writer import save_adapter, save_trained_adapter
from qlora_cli.errors import ModelError
from qlora_cli.events import SilentReporter
from qlora_cli.loading.load_plan import plan_load
from qlora_cli.loading.loader import load_planned
from qlora_cli.loading.save import save_quantized
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_cli.settings.choices import LoraInit
from qlora_cli.training.run_plan import prepare_run, settle_run
from qlora_cli.training.train_run import run
from tests.conftest import Recorder, train_settings
from tests.support.models.adapters import (
    adapt,
    assert_loads_again,
    load_for,
    lora_layers,
    put_back,
    settings_of,
    train_steps,
)
from tests.support.models.experts import save_moe
from tests.support.models.loading import asked_load, load, logits, refused, save_model, weight_of
from tests.support.models.reference_models import IDS, ROWS, load_plain
from tests.support.runs.merging import save_changing

pytestmark = pytest.mark.usefixtures("one_thread")

UNQUANTIZED = {"quantization__method": "none"}
CHOSEN = ["llama", "gpt2", "qwen2", "bamba"]
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that writes the model of a family once."""
    known: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in known:
            known[family] = save_model(tmp_path_factory.mktemp(family), family, vocab_size=ROWS)
        return known[family]

    return make


@pytest.fixture(scope="module")
def llama(saved: Make) -> Path:
    return saved("llama")


def first_values(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of the first layer."""
    layer = next(iter(lora_layers(model).values()))
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def test_default_and_gaussian_are_peft_s_own_and_differ(llama: Path) -> None:
    initial = {}
    for init in ("default", "gaussian"):
        torch.manual_seed(0)
        initial[init] = first_values(adapt(llama, settings_of(init_lora_weights=init)))
        torch.manual_seed(0)
        config = LoraConfig(r=8, init_lora_weights=True if init == "default" else init, target_modules=["q_proj"])
        assert torch.equal(first_values(get_peft_model(load_plain(llama), config))[0], initial[init][0])
    assert not torch.equal(initial["default"][0], initial["gaussian"][0])
    assert initial["gaussian"][0].std() == pytest.approx(1 / 8, rel=0.2)
    assert not initial["default"][1].any()
    assert not initial["gaussian"][1].any()


@pytest.mark.parametrize("family", CHOSEN)
def test_orthogonal_begins_with_two_matrices_whose_product_is_zero(saved: Make, family: str, tmp_path: Path) -> None:
    base = saved(family)
    before = logits(load(base).base, IDS)
    model = adapt(base, settings_of(init_lora_weights="orthogonal", alpha=8))
    for layer in lora_layers(model).values():
        right, left = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert right.dtype == left.dtype == torch.float32
        assert right.any()
        assert left.any()
        assert (left @ right).abs().max() < 1e-6
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
    losses = train_steps(model, learning_rate=1e-3)
    assert losses[0] > losses[1] > losses[2]
    assert_loads_again(model, base, tmp_path)


def test_orthogonal_is_what_peft_makes_of_an_unquantized_base(llama: Path) -> None:
    model = adapt(llama, settings_of(target_modules=("layers.0.self_attn.k_proj",)), **UNQUANTIZED)
    (layer,) = lora_layers(model).values()
    torch.manual_seed(0)
    initialize(model, LoraInit.ORTHOGONAL)
    ours = [value.clone() for value in first_values(model)]
    torch.manual_seed(0)
    layer.orthogonal_init("default")
    for mine, theirs in zip(ours, first_values(model), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_orthogonal_with_an_odd_rank_is_refused(llama: Path) -> None:
    base = load(llama).base
    with pytest.raises(ModelError, match=r"needs an even rank, and .*q_proj has 3"):
        attach_adapter(base, settings_of(init_lora_weights="orthogonal", rank_pattern={"q_proj": 3}))


# ---- PiSSA


@pytest.mark.parametrize(
    "lora", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 4, "c_attn": 4}}, {"use_dora": True}]
)
@pytest.mark.parametrize("family", CHOSEN)
def test_pissa_takes_the_principal_components_and_its_final_adapter_fits_the_original_base(
    saved: Make, family: str, lora: dict[str, object], tmp_path: Path
) -> None:
    base = saved(family)
    if "rank_pattern" in lora:
        names = [*lora_layers(adapt(base, settings_of()))]
        leaf = names[0].rpartition(".")[2]
        lora = {**lora, "rank_pattern": {leaf: 4}, "alpha_pattern": {leaf: 6}}
    original = load_plain(base)
    before = logits(original, IDS)
    settings = settings_of(alpha=8, init_lora_weights="pissa", **lora)
    model = adapt(base, settings, **UNQUANTIZED)
    torch.testing.assert_close(logits(model, IDS), before, rtol=1e-4, atol=1e-4)
    for name, layer in lora_layers(model).items():
        weight, rest = weight_of(original.get_submodule(name)), weight_of(layer.get_base_layer())
        rank = layer.r["default"]
        expected = torch.linalg.svdvals(weight.detach())[rank:]
        torch.testing.assert_close(
            torch.linalg.svdvals(rest.detach())[: len(expected)], expected, rtol=1e-3, atol=1e-4
        )
    losses = train_steps(model, learning_rate=1e-3)
    assert losses[0] > losses[1] > losses[2]
    trained = logits(model, IDS)
    assert (trained - before).abs().max() > 1e-2

    save_trained_adapter(model, tmp_path)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    assert (config["r"], config["init_lora_weights"]) == (16, True)
    other = logits(PeftModel.from_pretrained(load_plain(base), tmp_path), IDS)
    torch.testing.assert_close(other, trained, rtol=1e-4, atol=1e-4)
    ours = logits(put_back(load(base, **UNQUANTIZED).base, tmp_path), IDS)
    torch.testing.assert_close(ours, trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "modules_to_save": "lm_head,norm"}])
def test_a_run_with_pissa_ends_with_an_adapter_for_the_original_base_and_checkpoints_to_resume_from(
    llama: Path, rows: Path, tmp_path: Path, lora: dict[str, object]
) -> None:
    flags = {f"lora__{name}": value for name, value in {**lora, "init_lora_weights": "pissa", "rank": 8}.items()}
    settings = train_settings(llama, rows, tmp_path / "run", quantization__method="none", **flags)
    prepared = prepare_run(settings, Recorder())
    result = run(prepared, Recorder())
    trained = logits(prepared.model, IDS)
    other = logits(PeftModel.from_pretrained(load_plain(llama), result.adapter), IDS)
    torch.testing.assert_close(other, trained, rtol=1e-4, atol=1e-4)
    raw, final = (load_file(path / ADAPTER_WEIGHTS) for path in (result.checkpoints[-1], result.adapter))
    assert all(len(value) == 8 for key, value in raw.items() if "lora_A" in key)
    assert all(len(value) == 16 for key, value in final.items() if "lora_A" in key)


def test_what_the_final_save_adds_can_be_removed_again(llama: Path, tmp_path: Path) -> None:
    model = adapt(llama, settings_of(init_lora_weights="pissa", alpha=8), **UNQUANTIZED)
    train_steps(model, learning_rate=1e-3)
    save_adapter(model, tmp_path / "raw")
    save_trained_adapter(model, tmp_path / "final")
    raw, final = (load_file(tmp_path / name / ADAPTER_WEIGHTS) for name in ("raw", "final"))
    assert all(final[key].numel() == 2 * raw[key].numel() for key in raw)
    restored = as_trained(model, final)
    assert restored.keys() == raw.keys()
    assert all(torch.equal(restored[key], raw[key]) for key in raw)
    assert all(torch.equal(as_trained(model, raw)[key], raw[key]) for key in raw)
    damaged = {key: value + 1 for key, value in final.items()}
    assert all(torch.equal(as_trained(model, damaged)[key], damaged[key]) for key in raw)


def test_training_from_a_raw_checkpoint_of_pissa_ends_with_an_adapter_for_the_original_base(
    llama: Path, tmp_path: Path
) -> None:
    model = adapt(llama, settings_of(init_lora_weights="pissa", alpha=8), **UNQUANTIZED)
    train_steps(model, learning_rate=1e-3)
    save_adapter(model, tmp_path / "raw")
    again = put_back(load(llama, **UNQUANTIZED).base, tmp_path / "raw")
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    losses = train_steps(again, learning_rate=1e-3)
    assert losses[0] > losses[2]
    save_trained_adapter(again, tmp_path / "final")
    other = logits(PeftModel.from_pretrained(load_plain(llama), tmp_path / "final"), IDS)
    torch.testing.assert_close(other, logits(again, IDS), rtol=1e-4, atol=1e-4)


def test_a_raw_checkpoint_of_pissa_gives_its_logits_even_without_training(llama: Path, tmp_path: Path) -> None:
    model = adapt(llama, settings_of(init_lora_weights="pissa", alpha=8), **UNQUANTIZED)
    train_steps(model, learning_rate=1e-3)
    save_adapter(model, tmp_path)
    again = put_back(load(llama, **UNQUANTIZED).base, tmp_path, trainable=False)
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=1e-4, atol=1e-4)
    assert "PiSSA can't be used on a quantized base" in refused(tmp_path, ModelError, quantization__method="nf4")


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_config_without_defaults_continues_to_train_and_ends_with_an_adapter_for_the_original_base(
    llama: Path, use_rslora: bool, tmp_path: Path
) -> None:
    model = adapt(llama, settings_of(init_lora_weights="pissa", alpha=8, use_rslora=use_rslora), **UNQUANTIZED)
    save_adapter(model, tmp_path / "raw")
    file = tmp_path / "raw" / ADAPTER_CONFIG
    content = json.loads(file.read_text())
    needed = ["peft_type", "r", "target_modules", "init_lora_weights", "base_model_name_or_path", "task_type"]
    keys = [*needed, *(["use_rslora"] if use_rslora else [])]
    file.write_text(json.dumps({**{key: content[key] for key in keys}, "rank_pattern": None}))
    again = put_back(load(llama, **UNQUANTIZED).base, tmp_path / "raw")
    train_steps(again, learning_rate=1e-3)
    save_trained_adapter(again, tmp_path / "final")
    other = logits(PeftModel.from_pretrained(load_plain(llama), tmp_path / "final"), IDS)
    torch.testing.assert_close(other, logits(again, IDS), rtol=1e-4, atol=1e-4)


# ---- adapters without which the model is not the base


@pytest.fixture(params=["pissa", "olora", "layers"])
def changing(llama: Path, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter of plain PEFT that changes its base."""
    return save_changing(llama, tmp_path / request.param, request.param)


def test_continued_training_is_refused_before_weights_are_read(changing: Path, rows: Path, tmp_path: Path) -> None:
    settings = train_settings(changing, rows, tmp_path / "run", quantization__method="none")
    if changing.name == "pissa":
        assert settle_run(settings, Recorder()).load_plan.adapter is not None
        return
    with pytest.raises(ModelError, match="can't be trained further") as caught:
        settle_run(settings, Recorder())
    assert caught.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_an_adapter_that_subtracts_from_the_base_is_refused_on_a_quantized_one(changing: Path, method: str) -> None:
    if changing.name == "layers":
        assert load(changing, quantization__method=method).model is not None
        return
    with pytest.raises(ModelError, match="can't be used on a quantized base") as caught:  # before a weight is read
        plan_load(asked_load(changing, quantization__method=method), Recorder())
    assert "loftq" not in str(caught.value.hint)


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_pissa_on_a_quantized_base_is_refused(llama: Path, method: str) -> None:
    with pytest.raises(
        ModelError, match="PiSSA can't be used on a quantized base: it subtracts principal components"
    ) as caught:
        attach_adapter(load(llama, quantization__method=method).base, settings_of(init_lora_weights="pissa"))
    assert "--quant none, or loftq" in str(caught.value.hint)


def test_pissa_with_more_components_than_a_layer_has_is_refused(llama: Path) -> None:
    base = load(llama, **UNQUANTIZED).base
    with pytest.raises(ModelError, match=r"k_proj is 32 x 64, and has no 40 principal components"):
        attach_adapter(base, settings_of(rank=40, init_lora_weights="pissa", target_modules=("k_proj",)))


# ---- LoftQ


@pytest.fixture(scope="module", params=[*CHOSEN, "mixtral", "phi3"])
def unadapted(saved: Make, request: pytest.FixtureRequest) -> tuple[Path, torch.Tensor, torch.Tensor, str]:
    """A base, its logits unquantized and in nf4, and the end of the name of one of its layers."""
    base = saved(request.param)
    loaded = load(base).base
    leaf = next(iter(adapted_layers(loaded, target_modules(loaded, settings_of())[0]))).rpartition(".")[2]
    return base, logits(load_plain(base), IDS), logits(loaded, IDS), leaf


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True, "rank_pattern": {"c_attn": 4}}, {"use_dora": True}])
def test_loftq_begins_nearer_to_the_unquantized_model_than_nf4_alone(
    unadapted: tuple[Path, torch.Tensor, torch.Tensor, str], lora: dict[str, object], tmp_path: Path
) -> None:
    base, exact, alone, leaf = unadapted
    if "rank_pattern" in lora:
        lora = {**lora, "rank_pattern": {leaf: 4}}
    errors = [(alone - exact).norm()]
    for rank in (8, 32):
        model = adapt(base, settings_of(rank=rank, init_lora_weights="loftq", **lora))
        errors.append((logits(model, IDS) - exact).norm())
    assert errors[2] < 0.9 * errors[1] < 0.9 * 0.95 * errors[0]
    losses = train_steps(model, learning_rate=1e-3)
    assert losses[0] > losses[1] > losses[2]
    assert_loads_again(model, base, tmp_path)  # on the ordinary base


def test_loftq_is_the_best_approximation_of_its_rank_to_the_quantization_error(llama: Path) -> None:
    original = load_plain(llama)
    lora = settings_of(init_lora_weights="loftq", alpha=24)
    for name, layer in lora_layers(adapt(llama, lora)).items():
        base = layer.get_base_layer()
        assert isinstance(base, Linear4bit)
        restored = torch.nn.functional.linear(torch.eye(base.in_features), torch.eye(base.in_features))
        with torch.no_grad():
            lost = weight_of(original.get_submodule(name)) - base(restored).T
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        assert layer.scaling["default"] == 3
        expected = left[:, :8] * values[:8] @ right[:8]
        torch.testing.assert_close((lost - product).norm(), (lost - expected).norm(), rtol=1e-3, atol=0)


def test_loftq_of_a_rank_larger_than_a_layer_restores_the_whole_quantization_error(llama: Path) -> None:
    exact = logits(load_plain(llama), IDS)
    model = adapt(llama, settings_of(rank=96, init_lora_weights="loftq"))
    torch.testing.assert_close(logits(model, IDS), exact, rtol=1e-3, atol=1e-3)


def test_loftq_initializes_layers_that_are_not_in_4_bit_as_usual(llama: Path) -> None:
    lora = settings_of(init_lora_weights="loftq")
    layers = lora_layers(adapt(llama, lora, quantization__skip_modules="q_proj"))
    assert all(("q_proj" in name) != bool(layer.lora_B["default"].weight.any()) for name, layer in layers.items())


def test_loftq_reads_weights_from_several_files(llama: Path, tmp_path: Path) -> None:
    model = load_plain(llama, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / file).write_bytes((llama / file).read_bytes())
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    lora = settings_of(init_lora_weights="loftq")
    first, second = (lora_layers(adapt(path, lora)) for path in (llama, tmp_path))
    assert all(torch.equal(first[n].lora_B["default"].weight, second[n].lora_B["default"].weight) for n in first)


@pytest.mark.parametrize("method", ["int8", "none"])
def test_loftq_without_4_bit_is_refused(llama: Path, method: str) -> None:
    with pytest.raises(ModelError, match="no adapted layer is stored in 4 bit") as caught:
        load_for(llama, settings_of(init_lora_weights="loftq"), quantization__method=method)
    assert "--quant nf4 or fp4" in str(caught.value.hint)


def test_loftq_of_a_prequantized_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    save_quantized(load(llama), tmp_path / "quantized", SilentReporter())
    with pytest.raises(ModelError, match="and the checkpoint holds them quantized"):
        load_for(tmp_path / "quantized", settings_of(init_lora_weights="loftq"))


def test_loftq_on_a_model_without_recorded_quantization_errors_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="which were not recorded"):
        attach_adapter(load(llama).base, settings_of(init_lora_weights="loftq"))


@pytest.mark.parametrize("init", [init for init in LoraInit if init.needs_layers])
def test_fused_experts_accept_only_the_initializations_of_peft_itself(tmp_path: Path, init: LoraInit) -> None:
    base = save_moe(tmp_path, "qwen3_moe")
    lora = settings_of(init_lora_weights=init, target_parameters="all-experts")
    with pytest.raises(ModelError, match=f"lora.init_lora_weights: {init.value} can't be applied to fused experts"):
        attach_adapter(load(base).base, lora)
    gaussian = settings_of(init_lora_weights="gaussian", target_parameters="all-experts")
    losses = train_steps(adapt(base, gaussian), learning_rate=5e-3)
    assert losses[0] > losses[1] > losses[2]


def test_residuals_are_freed_once_the_adapter_is_initialized(llama: Path) -> None:
    lora = settings_of(init_lora_weights="loftq")
    silent = SilentReporter()
    loaded = load_planned(plan_load(asked_load(llama), silent), silent, lora=lora)
    quantizer: Any = loaded.base.hf_quantizer
    residuals = quantizer.quantization_config.residuals
    assert len(residuals.factors) == 14
    attach_adapter(loaded.base, lora)
    assert residuals.factors == {}
