"""Sums over what the weights of a layer are multiplied with: of the right tokens, and of each expert's own."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qlora_cli.calibrating.calibration import batches
from qlora_cli.calibrating.moments import MomentSums
from qlora_cli.quantization.methods.skip_modules import fused_experts
from tests.support.models.experts import MOE
from tests.support.models.tiny_models import VOCABULARY_SIZE, tiny_model

CONCATENATED = {"dbrx"}  # experts in one matrix, which are quantized as bitsandbytes does
ROWS = [torch.randint(3, VOCABULARY_SIZE, (length,), generator=torch.Generator().manual_seed(2)) for length in (12, 7)]


class Layer(nn.Module):
    """Two projections of one input, one of their sum, and one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out, self.unused = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.query(hidden) + self.key(hidden))
        return result


def test_sums_are_of_the_tokens_that_are_no_padding() -> None:
    layer, hidden = Layer(), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    sums = MomentSums(dict(layer.named_children()), {})
    with sums.watching(), torch.no_grad():
        for _ in range(2):
            sums.begin(mask)
            layer(hidden)
    tokens = hidden[mask]
    moments = {name: sums.of(name) for name in ("query", "key", "out", "unused")}
    assert moments["unused"] is None
    assert moments["key"] is moments["query"]
    query, out = moments["query"], moments["out"]
    assert query is not None
    assert out is not None
    assert query.num_tokens == out.num_tokens == 2 * 7
    torch.testing.assert_close(query.matrix, 2 * tokens.T @ tokens)
    inner = layer.query(tokens) + layer.key(tokens)
    torch.testing.assert_close(out.matrix, (2 * inner.T @ inner).detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_products_keep_all_bits_of_the_values(dtype: torch.dtype) -> None:
    layer = nn.Linear(256, 8, bias=False, dtype=dtype)
    tokens = torch.randn(1, 512, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = MomentSums({"layer": layer}, {})
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    with sums.watching(), torch.no_grad():
        sums.begin(torch.ones(1, 512, dtype=torch.bool))
        layer(tokens)
    assert settings.fp32_precision == before
    moments = sums.of("layer")
    assert moments is not None
    exact = tokens[0].double()
    torch.testing.assert_close(moments.matrix.double(), exact.T @ exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("family", [family for family in MOE if family not in CONCATENATED])
def test_each_expert_is_known_by_its_own_tokens(family: str) -> None:
    model = tiny_model(family).float().eval()
    model.config._experts_implementation = "eager"
    weights = {name: model.get_parameter(name) for name, _ in fused_experts(model)}
    assert weights
    sums = MomentSums({}, weights)
    with sums.watching():
        for batch in batches(ROWS, 0, alone=True):
            sums.begin(batch.mask)
            model(input_ids=batch.ids, use_cache=False)
    for name, weight in weights.items():
        counts = []
        for number, expert in enumerate(weight):
            moments = sums.of(name, number)
            counts.append(0 if moments is None else moments.num_tokens)
            if moments is not None:
                assert len(moments.matrix) == expert.shape[0 if sums.is_transposed(name) else 1]
        assert sum(counts) % sum(map(len, ROWS)) == 0, "each token goes to the same number of experts"
        assert sum(counts) > 0


def test_experts_of_equal_width_and_height_are_told_apart_by_how_they_are_multiplied() -> None:
    weight, tokens = torch.randn(3, 8, 8), torch.randn(5, 8)
    products: dict[bool, list[Callable[[torch.Tensor], torch.Tensor]]] = {
        False: [lambda one: nn.functional.linear(tokens, one), lambda one: tokens @ one.T],
        True: [
            lambda one: tokens @ one,
            lambda one: torch.matmul(tokens, one),
            lambda one: nn.functional.linear(tokens, one.T),
        ],
    }
    for is_transposed, functions in products.items():
        for function in functions:
            sums = MomentSums({}, {"experts": weight})
            with sums.watching():
                function(weight[torch.tensor(1)])
            moments = sums.of("experts", 1)
            assert moments is not None
            torch.testing.assert_close(moments.matrix, tokens.T @ tokens)
            assert sums.is_transposed("experts") is is_transposed
            assert sums.of("experts", 0) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensor_cores_round_no_input_and_are_off_again_afterwards(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 has 10 bits of a fraction: as fp16, and more than bf16."""
    layer, used, add = nn.Linear(8, 8, bias=False, dtype=dtype), set[str](), torch.Tensor.addmm_
    before = torch.backends.cuda.matmul.fp32_precision

    def watched(*given: torch.Tensor) -> torch.Tensor:
        used.add(torch.backends.cuda.matmul.fp32_precision)
        return add(*given)

    monkeypatch.setattr(torch.Tensor, "addmm_", watched)
    sums = MomentSums({"layer": layer}, {})
    with sums.watching():
        layer(torch.randn(1, 5, 8, dtype=dtype))
    assert used == {before if dtype == torch.float32 else "tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == before != "tf32"
