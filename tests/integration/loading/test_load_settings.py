"""Every setting of [model] changes something when a model is loaded, or is an error that says why.

Each test names the settings that it proves; a setting without a proof fails the last test.
"""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from qlora_cli.attention.expanded_heads import EXPANDED_SDPA, register_expanded_sdpa
from qlora_cli.errors import HardwareError, MissingDependencyError, ModelError, SettingsError
from qlora_cli.loading.load_plan import PACKAGES, attention_on
from qlora_cli.quantization.embedding import check_offload, keep_on_host
from qlora_cli.settings.choices import Attention
from qlora_cli.settings.models import SECTIONS, LoadCommandSettings, all_settings, metadata_of
from qlora_cli.settings.resolve import Sources, resolve
from tests.conftest import RunQlora
from tests.support.models.loading import Proofs, layers_of, load, logits, refused, save_model, weight_of
from tests.support.models.tiny_models import tiny_model

proves = Proofs()


@proves("name")
def test_the_name_chooses_the_weights(tmp_path: Path) -> None:
    one, other = save_model(tmp_path / "one"), save_model(tmp_path / "other", seed=1)
    assert not torch.equal(logits(load(one).base), logits(load(other).base))


@proves("revision")
def test_a_revision_of_a_directory_is_refused(base_model: Path) -> None:
    # For a hub id it selects the commit: tests/integration/hub/test_hub.py.
    message = refused(base_model, ModelError, model__revision="v1")
    assert "a revision (v1) has no meaning for the local directory" in message
    assert "Leave --revision out" in message


@proves("base_model")
def test_a_base_other_than_the_adapters_own_is_used_on_request_and_refused_for_a_whole_model(tmp_path: Path) -> None:
    one, other = save_model(tmp_path / "one"), save_model(tmp_path / "other", seed=1)
    adapter = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(one)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    loaded = load(adapter, model__base_model=str(other))
    assert loaded.report().base_model == str(other)
    assert torch.equal(logits(loaded.base), logits(load(other).base))
    message = refused(one, ModelError, model__base_model=str(other))
    assert f"model.base_model: {other} has no effect: {one} is a whole model" in message


@proves("dtype")
def test_the_dtype_is_that_of_the_unquantized_rest_and_of_the_products(base_model: Path) -> None:
    loaded_in = {dtype: load(base_model, model__dtype=dtype) for dtype in ("fp32", "bf16")}
    for dtype, loaded in loaded_in.items():
        assert {p.dtype for p in loaded.base.parameters() if type(p) is not Params4bit} == {loaded.dtype.torch_dtype}
        assert {x.compute_dtype for x in layers_of(loaded.base, Linear4bit).values()} == {loaded.dtype.torch_dtype}
        assert loaded.report().compute_dtype == dtype
    assert not torch.equal(logits(loaded_in["fp32"].base), logits(loaded_in["bf16"].base).float())
    assert "fp16 is not trained on a CPU" in refused(base_model, HardwareError, model__dtype="fp16")


@proves("device")
def test_the_device_is_the_one_asked_for_or_an_error(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {parameter.device.type for parameter in load(base_model, model__device="cpu").base.parameters()} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no NVIDIA GPU is visible" in refused(base_model, HardwareError, model__device="cuda")


@proves("attention")
def test_attention_is_the_kernel_asked_for_and_one_that_the_model_lacks_is_refused(
    base_model: Path, tmp_path: Path
) -> None:
    loaded_with = {kernel: load(base_model, model__attention=kernel) for kernel in ("auto", "eager", "sdpa")}
    used = {kernel: loaded.base.config._attn_implementation for kernel, loaded in loaded_with.items()}
    assert used == {"auto": "sdpa", "eager": "eager", "sdpa": "sdpa"}
    torch.testing.assert_close(
        logits(loaded_with["eager"].base), logits(loaded_with["sdpa"].base), rtol=1e-4, atol=1e-4
    )
    assert "needs an NVIDIA GPU" in refused(base_model, HardwareError, model__attention="flash_attention_2")
    assert "blockwise is for models without a kernel of PyTorch" in refused(
        base_model, ModelError, model__attention="blockwise"
    )
    # Its attention has sinks, which sdpa does not know.
    model = save_model(tmp_path / "gpt_oss", "gpt_oss")
    message = refused(model, ModelError, model__attention="sdpa")
    assert "GptOssForCausalLM does not compute attention by sdpa | Leave --attention out." in message
    for asked, kernel in (("auto", "blockwise"), ("blockwise", "blockwise"), ("eager", "eager")):
        loaded = load(model, model__attention=asked)
        assert loaded.attention == loaded.base.config._attn_implementation == kernel


@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2", "flash_attention_3"])
def test_a_kernel_without_its_package_is_refused_before_transformers_would_download_one(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Attention(attention)
    monkeypatch.setattr("qlora_cli.loading.load_plan.find_spec", lambda _: None)
    if PACKAGES[asked].is_installed():
        pytest.skip("it is installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(MissingDependencyError) as raised:
        attention_on(torch.device("cuda"), asked, tiny_model("llama"), torch.bfloat16)
    assert raised.value.message == f"{attention} needs the package {asked.package}"
    assert "leave --attention out" in (raised.value.hint or "")


@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_no_saved_config_has_the_name_of_an_attention(tmp_path: Path, family: str) -> None:
    """A name that this program gives to transformers would be unknown wherever else the model is loaded."""
    loaded = load(save_model(tmp_path / "base", family))
    if family == "llama":  # as on a GPU without flash attention
        register_expanded_sdpa()
        loaded.base.set_attn_implementation(EXPANDED_SDPA)
    assert loaded.base.config._attn_implementation in ("blockwise", EXPANDED_SDPA)
    loaded.base.save_pretrained(tmp_path / "saved")
    texts = [file.read_text() for file in (tmp_path / "saved").glob("*.json")]
    assert len(texts) >= 2
    assert not any("blockwise" in text or "sdpa" in text or "attn_implementation" in text for text in texts)


@proves("offload_embedding")
def test_an_offloaded_embedding_is_refused_on_a_cpu_and_where_the_head_shares_it(base_model: Path) -> None:
    message = refused(base_model, HardwareError, model__offload_embedding=True)
    assert "model.offload_embedding: has no effect: the model is on cpu" in message
    with pytest.raises(ModelError, match="the output head shares the weight"):
        check_offload(tiny_model("llama", tie_word_embeddings=True), torch.device("cuda"))
    check_offload(tiny_model("llama", tie_word_embeddings=False), torch.device("cuda"))


def test_an_embedding_on_the_host_takes_ids_from_a_device_and_gives_vectors_to_it() -> None:
    embedding = torch.nn.Embedding(8, 4)
    keep_on_host(embedding, torch.device("meta"))  # stands for a GPU: a device that the weight is not on
    vectors = embedding(torch.tensor([[1, 2]]))
    assert (vectors.device.type, vectors.shape) == ("meta", (1, 2, 4))
    assert embedding.weight.device.type == "cpu"
    on_host = torch.nn.Embedding(8, 4)
    keep_on_host(on_host, torch.device("cpu"))
    assert torch.equal(on_host(torch.tensor([3])), on_host.weight[[3]])
    # The other way round: ids from another device are moved to that of the weight.
    on_device = torch.nn.Embedding(8, 4, device="meta")
    keep_on_host(on_device, torch.device("meta"))
    assert on_device(torch.tensor([3])).device.type == "meta"


@proves("new_tokens")
def test_new_tokens_are_one_token_each_and_get_rows_if_none_are_spare(tmp_path: Path) -> None:
    full = save_model(tmp_path / "full", tie_word_embeddings=False)
    plain, loaded = load(full), load(full, model__new_tokens="<tool>,</tool>")
    assert loaded.new_token_ids == (3072, 3073)
    assert "the embedding was extended from 3,072 to 3,074 rows" in loaded.report().notes
    for one, ids in ((loaded, [3072]), (plain, None)):
        tokens = one.tokenizer("<tool>", add_special_tokens=False)["input_ids"]
        assert tokens == ids or (ids is None and len(tokens) > 1)
    for grown, before in zip(ends(loaded.base), ends(plain.base), strict=True):
        assert grown.shape == (3074, 64)
        assert torch.equal(grown[:3072], before)
        assert torch.equal(grown[3072:], before.mean(0).expand(2, -1))
    spare = load(save_model(tmp_path / "spare", vocab_size=3136), model__new_tokens="<tool>")
    assert spare.new_token_ids == (3072,)
    assert ends(spare.base)[0].shape == (3136, 64)


def ends(model: PreTrainedModel) -> list[torch.Tensor]:
    return [weight_of(model.get_input_embeddings()), weight_of(model.get_output_embeddings())]


@proves("resize_vocab")
def test_a_tokenizer_with_more_ids_than_rows_needs_the_flag_that_grows_the_model(tmp_path: Path) -> None:
    model = save_model(tmp_path / "small", vocab_size=3008)
    message = refused(model, ModelError)
    assert "has ids up to 3071, but the embedding only 3008 rows" in message
    assert "--resize-vocab extends the embedding" in message
    loaded = load(model, model__resize_vocab=True)
    assert [tuple(end.shape) for end in ends(loaded.base)] == [(3072, 64)] * 2
    assert loaded.new_token_ids == ()
    assert logits(loaded.base).shape[-1] == loaded.base.config.vocab_size == 3072


@proves("rope_scaling")
def test_rotary_positions_are_stretched_on_request_and_the_report_says_so(base_model: Path) -> None:
    plain, stretched = load(base_model), load(base_model, model__rope_scaling="yarn:4")
    positions = [loaded.base.config.max_position_embeddings for loaded in (plain, stretched)]
    assert positions == [512, 2048]
    assert stretched.base.config.rope_parameters["rope_type"] == "yarn"
    assert not torch.equal(logits(plain.base), logits(stretched.base))
    assert "rotary positions stretched from 512 to 2,048 (yarn:4)" in stretched.report().notes


@proves("chat_template")
def test_a_chat_template_replaces_that_of_the_tokenizer(base_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "short.jinja"
    template.write_text("{% for message in messages %}[{{ message['content'] }}]{% endfor %}")
    message = [{"role": "user", "content": "hi"}]
    own = load(base_model).tokenizer.apply_chat_template(message, tokenize=False)
    given = load(base_model, model__chat_template=str(template)).tokenizer.apply_chat_template(message, tokenize=False)
    assert given == "[hi]" != own
    assert "no chat template 'mistral'" in refused(base_model, ModelError, model__chat_template="mistral")


@proves("allow_pickle")
def test_a_pickle_is_read_only_if_it_is_allowed(tmp_path: Path) -> None:
    safe, pickled = save_model(tmp_path / "safe"), save_model(tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    message = refused(pickled, ModelError)
    assert "found only pytorch_model.bin, a pickle" in message
    assert "--allow-pickle" in message
    assert torch.equal(logits(load(pickled, model__allow_pickle=True).base), logits(load(safe).base))


CONFIGURATION = """
import os, pathlib
from transformers import LlamaConfig
pathlib.Path(os.environ["MARKER"]).write_text("ran")
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@proves("trust_remote_code")
def test_code_of_a_model_runs_only_with_the_flag(run_qlora: RunQlora, tmp_path: Path) -> None:
    model = save_model(tmp_path / "own")
    (model / "configuration_own.py").write_text(CONFIGURATION)
    (model / "modeling_own.py").write_text(MODELING)
    config = json.loads((model / "config.json").read_text())
    places = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": places}))
    marker = tmp_path / "marker"
    arguments = ("load", model, "--device", "cpu", "--json")
    done = run_qlora(*arguments, env={"MARKER": str(marker)})
    assert done.code == 2
    assert "comes with its own Python code, which is not run by default" in done.stderr
    assert "--trust-remote-code" in done.stderr
    assert not marker.exists()
    trusted = run_qlora(*arguments, "--trust-remote-code", env={"MARKER": str(marker)})
    assert trusted.code == 0, trusted.stderr
    assert trusted.json["architecture"] == "OwnForCausalLM"
    assert trusted.json["num_quantized_parameters"] > 0
    assert marker.exists()


def test_settings_that_run_foreign_code_are_never_enabled_by_a_file(
    run_qlora: RunQlora, base_model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.yaml"
    by_hand = [path for path in all_settings() if metadata_of(path).is_forbidden_in_files]
    assert by_hand == ["model.allow_pickle", "model.trust_remote_code"]
    lines = [f"{section}: {{{key}: true}}" for section, key in (path.split(".") for path in by_hand)]
    for path, line in zip(by_hand, lines, strict=True):
        config.write_text(line + "\n")
        with pytest.raises(SettingsError) as caught:
            resolve(Sources(config=config, flags={"model.name": ("MODEL", "base")}), LoadCommandSettings)
        assert f"{config}:1 {path}: can't be enabled in a settings file" in str(caught.value)
        assert f"Give {metadata_of(path).flag} on the command line" in str(caught.value.problems[0].hint)
    config.write_text("model:\n  allow_pickle: true\n  trust_remote_code: true\n")
    done = run_qlora("load", base_model, "--config", config)
    assert (done.code, "2 problems" in done.stderr) == (2, True), done.stderr


def test_every_setting_has_a_proof_here() -> None:
    assert set(SECTIONS["model"].model_fields) == proves.proven
