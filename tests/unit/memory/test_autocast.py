"""Autocast of tensors without data, compared with PyTorch's own on a CPU and with its published rules for CUDA.

The lists of the CPU and of CUDA agree on what is computed in 16 bit. What only CUDA computes in fp32 is checked by
the list that PyTorch publishes (`docs/source/amp.rst`).
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows it by
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_cli.memory.tracing.functions import IN_16_BIT, IN_FP32, GpuFunctions
from qlora_cli.memory.tracing.kernels import Kernels
from qlora_cli.memory.tracing.trace import MemoryTrace
from tests.support.models.tiny_models import tiny_config

A100 = (8, 0)
Function = Callable[..., torch.Tensor]

# Functions computed in 16 bit by both, whatever the dtypes of the arguments, with the shapes of these.
BOTH: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((3, 8), (4, 8), (4,))),
    "matmul": (torch.matmul, ((2, 3, 8), (8, 4))),
    "@": (lambda a, b: a @ b, ((3, 8), (8, 4))),
    "mm": (torch.mm, ((3, 8), (8, 4))),
    "bmm": (torch.bmm, ((2, 3, 8), (2, 8, 4))),
    "addmm": (torch.addmm, ((3, 4), (3, 8), (8, 4))),
    "baddbmm": (torch.baddbmm, ((2, 3, 4), (2, 3, 8), (2, 8, 4))),
    "addbmm": (torch.addbmm, ((3, 4), (2, 3, 8), (2, 8, 4))),
    "conv1d": (F.conv1d, ((1, 8, 5), (4, 8, 3))),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ik", a, b), ((3, 8), (8, 4))),
    "attention": (F.scaled_dot_product_attention, ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))),
}
# Left in their dtype by both.
NEITHER: dict[str, tuple[Function, tuple[tuple[int, ...], ...]]] = {
    "add": (torch.add, ((3, 4), (3, 4))),
    "mul": (lambda a, b: a * b, ((3, 4), (3, 4))),
    "relu": (F.relu, ((3, 4),)),
    "silu": (F.silu, ((3, 4),)),
    "gelu": (F.gelu, ((3, 4),)),
    "mean": (torch.mean, ((3, 4),)),
    "transpose": (lambda a: a.T, ((3, 4),)),
}
# In fp32 by CUDA alone, or by both.
TO_FP32: dict[str, Function] = {
    "softmax": lambda a: F.softmax(a, dim=-1),
    "torch.softmax": lambda a: torch.softmax(a, -1),
    "log_softmax": lambda a: F.log_softmax(a, dim=-1),
    "layer_norm": lambda a: F.layer_norm(a, (4,)),
    "group_norm": lambda a: F.group_norm(a, 2),
    "pow": lambda a: a.pow(2),
    "**": lambda a: a**2,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "log": torch.log,
    "softplus": F.softplus,
    "sum": lambda a: a.sum(-1),
    "cumsum": lambda a: a.cumsum(-1),
    "prod": lambda a: a.prod(-1),
    "norm": lambda a: a.norm(),
    "linalg.norm": lambda a: torch.linalg.norm(a, dim=1),
    "logsumexp": lambda a: a.logsumexp(-1),
    "cross_entropy": lambda a: F.cross_entropy(a, torch.zeros(a.shape[0], dtype=torch.long, device=a.device)),
    "nll_loss": lambda a: F.nll_loss(a, torch.zeros(a.shape[0], dtype=torch.long, device=a.device)),
    "mse_loss": lambda a: F.mse_loss(a, a),
    "binary_cross_entropy_with_logits": lambda a: F.binary_cross_entropy_with_logits(a, a),
}


def tensors(shapes: tuple[tuple[int, ...], ...], dtypes: list[torch.dtype], device: str) -> list[torch.Tensor]:
    return [torch.ones(shape, dtype=dtypes[index % len(dtypes)], device=device) for index, shape in enumerate(shapes)]


def ours(function: Function, arguments: list[torch.Tensor], dtype: torch.dtype = torch.bfloat16) -> torch.dtype:
    functions = GpuFunctions(A100, dtype=dtype)
    with functions, functions.autocast():
        return function(*arguments).dtype


@pytest.mark.parametrize("dtypes", [[torch.float32], [torch.bfloat16], [torch.float32, torch.bfloat16]])
@pytest.mark.parametrize("name", BOTH)
def test_products_are_in_16_bit_as_under_the_autocast_of_the_cpu(name: str, dtypes: list[torch.dtype]) -> None:
    function, shapes = BOTH[name]
    with torch.autocast("cpu", torch.bfloat16):
        real = function(*tensors(shapes, dtypes, "cpu")).dtype
    assert real == torch.bfloat16
    assert ours(function, tensors(shapes, dtypes, "meta")) == real


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NEITHER)
def test_functions_without_a_rule_do_not_change_dtype_as_under_the_autocast_of_the_cpu(
    name: str, dtype: torch.dtype
) -> None:
    function, shapes = NEITHER[name]
    with torch.autocast("cpu", torch.bfloat16):
        real = function(*tensors(shapes, [dtype], "cpu")).dtype
    assert ours(function, tensors(shapes, [dtype], "meta")) == real == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TO_FP32)
def test_functions_that_cuda_computes_in_fp32_return_fp32(name: str, dtype: torch.dtype) -> None:
    assert ours(TO_FP32[name], tensors(((3, 4),), [dtype], "meta"), dtype) == torch.float32


@pytest.mark.parametrize("name", ["cat", "stack"])
def test_tensors_of_two_dtypes_are_joined_in_the_wider(name: str) -> None:
    function = getattr(torch, name)
    for dtypes, expected in (
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
    ):
        arguments = tensors(((3, 4), (3, 4)), dtypes, "meta")
        assert ours(lambda *values: function(values), arguments) == expected


def test_an_explicit_dtype_stays() -> None:
    (half,) = tensors(((3, 4),), [torch.bfloat16], "meta")
    assert ours(lambda a: F.softmax(a, dim=-1, dtype=torch.bfloat16), [half]) == torch.bfloat16
    assert ours(lambda a: a.sum(dtype=torch.bfloat16), [half]) == torch.bfloat16


def test_fp64_and_integers_are_not_cast() -> None:
    assert ours(torch.mm, tensors(((3, 3), (3, 3)), [torch.float64], "meta")) == torch.float64
    assert ours(lambda a: a.sum(), tensors(((3, 3),), [torch.long], "meta")) == torch.long


def test_no_function_is_in_two_lists() -> None:
    assert not IN_16_BIT & IN_FP32


def test_nothing_is_cast_outside_of_autocast_or_while_it_is_disabled() -> None:
    left, right = tensors(((3, 8), (8, 4)), [torch.float32], "meta")
    functions = GpuFunctions(A100, dtype=torch.bfloat16)
    with functions:
        assert (left @ right).dtype == torch.float32
        with functions.autocast():
            assert (left @ right).dtype == torch.bfloat16
            with functions.autocast(enabled=False):
                assert (left @ right).dtype == torch.float32
            assert (left @ right).dtype == torch.bfloat16
        assert (left @ right).dtype == torch.float32
    without = GpuFunctions(A100)
    with without, without.autocast():
        assert (left @ right).dtype == torch.float32


def test_the_flag_of_the_gpu_is_set_within_and_restored_afterwards() -> None:
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    functions = GpuFunctions(A100, dtype=torch.bfloat16)
    with functions.autocast():
        assert torch.is_autocast_enabled()  # as PEFT checks it
        assert torch.get_autocast_dtype("cuda") == torch.bfloat16
        assert torch.get_autocast_dtype("meta") == torch.bfloat16  # of the device that a tensor is on
    assert (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")) == before


def test_modules_that_disable_autocast_on_a_gpu_run_without_it() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("nemotron"))
    functions = GpuFunctions(A100, dtype=torch.bfloat16)
    seen: dict[str, bool] = {}

    def note(module: nn.Module, *_: Any) -> None:
        seen[type(module).__name__] = torch.is_autocast_enabled("cuda")

    hooks = functions.disable_autocast_hooks(model)
    assert hooks
    hooks += [module.register_forward_pre_hook(note) for module in model.modules()]
    with functions, functions.autocast():
        model(input_ids=torch.zeros((1, 4), dtype=torch.long, device="meta"))
        assert torch.is_autocast_enabled("cuda")
    assert not seen["NemotronLayerNorm1P"]
    assert seen["NemotronMLP"]
    for hook in hooks:
        hook.remove()


def test_without_autocast_no_module_is_changed() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
    assert GpuFunctions(A100).disable_autocast_hooks(model) == []


def test_dropout_stores_a_mask_of_one_byte_per_element() -> None:
    trace = MemoryTrace(Kernels(A100))
    values = torch.empty((4, 1024), dtype=torch.bfloat16, device="meta")
    with trace, GpuFunctions(A100):
        dropped = nn.functional.dropout(values, 0.1)
    assert dropped.dtype == torch.bfloat16
    assert sorted(storage.num_bytes for storage in trace.storages) == [4096, 8192]


def allocations(count: int, *, trained: bool) -> list[int]:
    """Return the bytes allocated by using one fp32 weight `count` times in a pass."""
    weight = nn.Parameter(torch.empty((16, 8), device="meta"), requires_grad=trained)
    x = torch.empty((4, 8), dtype=torch.bfloat16, device="meta")
    functions, trace = GpuFunctions(A100, dtype=torch.bfloat16), MemoryTrace(Kernels(A100))
    trace.ignore(weight)
    trace.ignore(x)
    with trace, functions, functions.autocast():
        results = [F.linear(x, weight) for _ in range(count)]
    assert all(result.dtype == torch.bfloat16 for result in results)
    return [storage.num_bytes for storage in trace.storages]


def test_a_trained_fp32_weight_is_cast_once_in_a_pass_and_a_frozen_one_each_time() -> None:
    cast = 16 * 8 * 2
    assert allocations(3, trained=True).count(cast) == 1
    assert allocations(3, trained=False).count(cast) == 3


def test_the_cast_of_a_weight_is_released_when_autocast_ends() -> None:
    weight = nn.Parameter(torch.empty((16, 8), device="meta"))
    x = torch.empty((4, 8), dtype=torch.bfloat16, device="meta")
    functions, trace = GpuFunctions(A100, dtype=torch.bfloat16), MemoryTrace(Kernels(A100))
    trace.ignore(weight)
    trace.ignore(x)
    with torch.no_grad(), trace, functions:
        with functions.autocast():
            F.linear(x, weight)
            trace.mark("end")
        F.linear(x.float(), weight)
    cast = next(number for number, storage in enumerate(trace.storages) if storage.num_bytes == 16 * 8 * 2)
    assert ~cast in trace.segments[-1].events


def test_a_lora_layer_has_16_bit_activations_and_fp32_gradients_of_its_matrices() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(64, 128, bias=False, device="meta", dtype=torch.bfloat16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.up(x)
            return result

    model = get_peft_model(Model(), LoraConfig(r=8, target_modules=["up"]))
    x = torch.empty((40, 64), dtype=torch.bfloat16, device="meta", requires_grad=True)
    functions, trace = GpuFunctions(A100, dtype=torch.bfloat16), MemoryTrace(Kernels(A100))
    matrices = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {matrix.dtype for matrix in matrices} == {torch.float32}
    for tensor in (x, *model.parameters()):
        trace.ignore(tensor)
    with trace, functions:
        with functions.autocast():
            result = model(x)
        forward = [storage.num_bytes for storage in trace.storages]
        result.backward(torch.empty_like(result))
    assert result.dtype == torch.bfloat16
    assert 40 * 8 * 2 in forward  # of A, in 16 bit
    assert 40 * 8 * 4 not in forward
    assert forward.count(40 * 128 * 2) >= 2
    assert 40 * 128 * 4 not in forward
    assert all(matrix.grad is not None and matrix.grad.dtype == torch.float32 for matrix in matrices)
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
