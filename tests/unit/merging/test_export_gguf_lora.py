"""A LoRA in GGUF: what it can hold, by which scale, and that a file that is not the adapter is detected."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_cli.errors import ExportError, MissingDependencyError, ModelError
from qlora_cli.merging.exports.gguf_lora import UNSUPPORTED, low_rank_pairs, write_adapter
from qlora_cli.merging.exports.llama_cpp.converter import Converter, convert_adapter
from qlora_cli.merging.exports.llama_cpp.lora_file import Factors, lora_mismatches
from qlora_cli.merging.planning.weight_changes import (
    AddedVector,
    DoraChange,
    ExpertUpdate,
    LowRankUpdate,
    RowUpdate,
    WeightChange,
    WeightedChange,
    WholeParameter,
)

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"
ONE = torch.ones(2, 2)
PLAIN = LowRankUpdate(left=ONE, right=ONE, scale=1.0)
REFUSED: Mapping[str, tuple[WeightChange, ...]] = {
    "DoRA": (DoraChange(update=PLAIN, magnitude=ONE[0]),),
    "an adapter on experts": (ExpertUpdate(left=ONE, right=ONE, scale=1.0, num_experts=2, is_transposed=False),),
    "a trained bias": (AddedVector(values=ONE[0], scale=1.0),),
    "trained rows of tokens": (RowUpdate(indices=(0, 1), values=ONE),),
    "modules that are trained whole": (WholeParameter(values=ONE),),
    "several adapters at once": (PLAIN, PLAIN),
    "weights that are stored transposed": (LowRankUpdate(left=ONE, right=ONE, scale=1.0, is_transposed=True),),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_lora_can_not_hold_is_refused_by_its_name(what: str) -> None:
    refused = [WeightedChange(change=change) for change in REFUSED[what]]
    changes = {f"{Q}.weight": [WeightedChange(change=PLAIN)], f"{UP}.weight": refused}
    with pytest.raises(ModelError, match=rf"merge.formats: .*can't hold .*{what}.* \({UP}.weight\)") as caught:
        low_rank_pairs(changes)
    assert "--format gguf" in str(caught.value.hint)


def test_every_kind_of_change_but_lora_is_refused() -> None:
    kinds = [WeightChange]
    for kind in kinds:
        kinds += kind.__subclasses__()
    concrete = {kind for kind in kinds if kind.__module__ == WeightChange.__module__ and not kind.__subclasses__()}
    assert concrete == {*UNSUPPORTED, LowRankUpdate}


def pairs() -> Mapping[str, LowRankUpdate]:
    """Return two updates of different ranks and scales, the second one weighted."""
    torch.manual_seed(0)
    one = LowRankUpdate(left=torch.randn(6, 4), right=torch.randn(4, 8), scale=8.0)
    other = LowRankUpdate(left=torch.randn(5, 2), right=torch.randn(2, 8), scale=3.0)
    changes = {
        f"{Q}.weight": [WeightedChange(change=one)],
        f"{UP}.weight": [WeightedChange(change=other, weight=0.5)],
    }
    return low_rank_pairs(changes)


def test_one_alpha_scales_all_modules_as_the_adapter_does(tmp_path: Path) -> None:
    factors = write_adapter(pairs(), tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, pair in pairs().items():
        right, left, scale = factors[name]
        torch.testing.assert_close(scale * left @ right, pair.delta())
        assert torch.equal(stored[f"base_model.model.{name}.lora_A.weight"], right)
        assert torch.equal(stored[f"base_model.model.{name}.lora_B.weight"], left)
    assert [factors[name][2] for name in (Q, UP)] == [8.0, 16.0]  # alpha 32, by the rank of each
    assert torch.equal(factors[Q][1], pairs()[Q].left)


def written(
    directory: Path, factors: Factors, *, alpha: float = 32.0, without: str = "", more: tuple[str, ...] = ()
) -> Path:
    writer = gguf.GGUFWriter(directory / "a.gguf", "llama")
    writer.add_float32("adapter.lora.alpha", alpha)
    for module, name in ((Q, "blk.0.attn_q"), (UP, "blk.1.ffn_up")):
        if module != without:
            writer.add_tensor(f"{name}.weight.lora_a", factors[module][0].numpy())
            writer.add_tensor(f"{name}.weight.lora_b", np.ascontiguousarray(factors[module][1].numpy()[::-1]))
    for name in more:
        writer.add_tensor(name, np.zeros(2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "a.gguf"


def test_a_file_that_is_not_the_adapter_is_described(tmp_path: Path) -> None:
    factors = write_adapter(pairs(), tmp_path / "adapter")
    assert lora_mismatches(written(tmp_path, factors), factors) == []
    assert lora_mismatches(written(tmp_path, factors, without=UP), factors) == [f"{UP} is not in it"]
    assert lora_mismatches(written(tmp_path, factors, alpha=16.0), factors) == [
        f"{Q} is scaled by 4, not by 8",
        f"{UP} is scaled by 8, not by 16",
    ]
    more = written(tmp_path, factors, more=("blk.0.attn_norm.weight",))
    assert lora_mismatches(more, factors) == ["it holds 1 tensor more, such as blk.0.attn_norm.weight"]
    right, left, scale = factors[Q]
    for changed in ((right.flip(0), left, scale), (right, left * 1.001, scale), (right, left.flip(1), scale)):
        wrong = lora_mismatches(written(tmp_path, {**factors, Q: changed}), factors)
        assert wrong == [f"{Q} has other values in it"]
    (tmp_path / "a.gguf").write_bytes(b"garbage")
    with pytest.raises(ExportError, match="can't be read as GGUF"):
        lora_mismatches(tmp_path / "a.gguf", factors)


def test_a_converter_without_the_script_for_adapters_is_an_error(tmp_path: Path) -> None:
    converter = Converter(script=tmp_path / "convert_hf_to_gguf.py")
    with pytest.raises(MissingDependencyError, match=r"holds no convert_lora_to_gguf.py"):
        convert_adapter(converter, tmp_path, tmp_path, tmp_path / "a.gguf")
