"""The operations of a traced step: FLOPs as counted by hand, and bytes by operator."""

from typing import Any

import pytest
import torch

from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.model_facts import ModelFacts
from qlora_cli.memory.tracing.operations import CAUSAL_AT, operations_of
from qlora_cli.memory.tracing.owners import Owner
from qlora_cli.timing.operation import Operation, OperationKind, Pass
from tests.support.models.counted_steps import (
    ATTENTION_FLOPS,
    GPU,
    HEAD_FLOPS,
    LINEARS,
    LORA_FLOPS,
    NUM_WEIGHTS,
    ONE_LAYER,
    RANK,
    TOKENS,
    counted,
    flops_by_kind,
    settings_of,
)
from tests.support.models.tracing import UncountedStep, deep_config


@pytest.mark.parametrize("checkpointing", ["on", "selective", "off"])
def test_the_flops_of_one_layer_are_those_counted_by_hand(checkpointing: str) -> None:
    flops = flops_by_kind(counted(deep_config("llama", 1, **ONE_LAYER), checkpointing))
    base = 2 * TOKENS * NUM_WEIGHTS
    # Without checkpointing nothing asks for the gradient of the embeddings: not q, k, v, but the others.
    first = 2 * TOKENS * sum(wide * narrow for wide, narrow in LINEARS[:3]) if checkpointing == "off" else 0
    assert flops.pop((OperationKind.BASE_GEMM, Pass.FORWARD)) == base
    assert flops.pop((OperationKind.BASE_GEMM, Pass.BACKWARD)) == base - first
    assert flops.pop((OperationKind.ATTENTION, Pass.FORWARD)) == ATTENTION_FLOPS
    assert flops.pop((OperationKind.ATTENTION, Pass.BACKWARD)) == 2.5 * ATTENTION_FLOPS
    if checkpointing == "on":
        last = 2 * TOKENS * LINEARS[-1][0] * LINEARS[-1][1]  # nothing needs its result again
        assert flops.pop((OperationKind.BASE_GEMM, Pass.RECOMPUTE)) == base - last
        assert flops.pop((OperationKind.ATTENTION, Pass.RECOMPUTE)) == ATTENTION_FLOPS
    assert flops.pop((OperationKind.LORA_GEMM, Pass.FORWARD)) == LORA_FLOPS
    assert flops.pop((OperationKind.LORA_GEMM, Pass.BACKWARD)) <= 2 * LORA_FLOPS
    if checkpointing != "off":
        assert flops.pop((OperationKind.LORA_GEMM, Pass.RECOMPUTE)) <= LORA_FLOPS
    loss = flops.pop((OperationKind.LOSS, Pass.FORWARD)) + flops.pop((OperationKind.LOSS, Pass.BACKWARD), 0)
    assert loss == 2 * HEAD_FLOPS  # logits, and the gradient of the hidden states
    assert flops == {}


@pytest.mark.parametrize("checkpointing", ["on", "selective", "off", "offload"])
def test_counting_does_not_change_the_memory_of_a_step(checkpointing: str) -> None:
    facts = ModelFacts(name="tiny", content=deep_config("llama").to_dict())
    settings = settings_of(checkpointing, gradient_accumulation_steps=2)
    without = Estimator(facts, loop=UncountedStep).traced(settings, GPU)
    assert without.micro_batch == ()
    assert Estimator(facts).traced(settings, GPU).events == without.events


def test_one_micro_batch_is_counted_however_many_a_step_has() -> None:
    config = deep_config("llama", 2)
    one, many = (
        counted(config, "on", gradient_accumulation_steps=number, eval_steps=steps)
        for number, steps in ((1, None), (8, 5))
    )
    assert flops_by_kind(one) == flops_by_kind(many)
    sums = {(run_in, number) for (_, run_in), (number, _, _) in many.items()} - {
        (run_in, number) for (_, run_in), (number, _, _) in one.items()
    }
    assert {run_in for run_in, _ in sums} <= {Pass.FORWARD, Pass.BACKWARD}  # batches, and sums of gradients


def test_pairs_take_a_forward_pass_of_the_base_more_only_where_it_is_the_reference() -> None:
    config = deep_config("llama", 1, **ONE_LAYER)
    dpo, orpo = (flops_by_kind(counted(config, "on", objective=name)) for name in ("dpo", "orpo"))
    forward = (OperationKind.BASE_GEMM, Pass.FORWARD)
    assert dpo.pop(forward) == 2 * orpo[forward] == 2 * 2 * 2 * TOKENS * NUM_WEIGHTS, "of two sequences"
    attention = (OperationKind.ATTENTION, Pass.FORWARD)
    assert dpo.pop(attention) == 2 * orpo[attention]
    loss = (OperationKind.LOSS, Pass.FORWARD)
    assert dpo.pop(loss) > orpo[loss]
    assert dpo == {key: flops for key, flops in orpo.items() if key not in (forward, attention, loss)}


def test_labels_take_three_forward_passes_more_than_answers() -> None:
    config = deep_config("llama", 1, **ONE_LAYER)
    kto, sft = (flops_by_kind(counted(config, "on", objective=name)) for name in ("kto", "sft"))
    forward, attention, loss = (
        (kind, Pass.FORWARD) for kind in (OperationKind.BASE_GEMM, OperationKind.ATTENTION, OperationKind.LOSS)
    )
    assert kto.pop(forward) == 4 * sft[forward]
    assert kto.pop(attention) == 4 * sft[attention]
    assert kto.pop(loss) > sft[loss]
    adapter = (OperationKind.LORA_GEMM, Pass.FORWARD)
    assert kto.pop(adapter) == 2 * sft[adapter], "of the baseline, and of the answers"
    rest = {key: flops for key, flops in sft.items() if key not in (forward, attention, loss, adapter)}
    assert {key: kto[key] for key in rest} == rest


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_experts_multiply_the_tokens_that_are_sent_to_them(dtype: str) -> None:
    config = deep_config("mixtral", 1, num_experts=8, num_experts_per_tok=2)
    flops = flops_by_kind(counted(config, "on", model={"name": "tiny", "dtype": dtype}))
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.hidden_size // config.num_attention_heads
    attention = 2 * hidden * hidden + 2 * hidden * heads * config.num_key_value_heads
    of_experts = 2 * 3 * hidden * inner  # two of the eight for each token
    assert flops[OperationKind.BASE_GEMM, Pass.FORWARD] == 2 * TOKENS * (attention + of_experts)
    of_router = hidden * 8
    assert flops[OperationKind.BASE_GEMM, Pass.BACKWARD] == 2 * TOKENS * (attention + of_experts + of_router)


@pytest.mark.parametrize(("family", "checkpointing"), [("llama", "on"), ("qwen3", "off"), ("gemma3_text", "on")])
def test_few_layers_extend_to_the_operations_of_all(family: str, checkpointing: str) -> None:
    config = deep_config(family, 6)
    of_few, of_all = counted(config, checkpointing), counted(config, checkpointing, whole=True)
    assert of_few == of_all
    assert {
        OperationKind.BASE_GEMM,
        OperationKind.NORM,
        OperationKind.ROPE,
        OperationKind.MLP,
        OperationKind.LOSS,
    } <= {kind for kind, _ in of_all}


@torch.library.custom_op("qlora_tests::unknown", mutates_args=())
def unknown(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first + second


def cost(func: Any, *args: Any, owner: Owner | None = None, **kwargs: Any) -> Operation:
    """Return what a call costs."""
    owner = owner or Owner(OperationKind.RESIDUAL)
    (operation,) = operations_of(func, args, kwargs, func(*args, **kwargs), owner, Pass.FORWARD, TOKENS)
    return operation


def test_an_operator_moves_its_inputs_and_outputs() -> None:
    aten, values = torch.ops.aten, torch.ones(3, 4)
    assert cost(aten.add.Tensor, values, values).num_bytes == 3 * 48
    assert cost(aten.add_.Tensor, values, values.half()).num_bytes == 2 * 48 + 24
    assert cost(aten.add.Tensor, values, torch.ones(3, 1).expand(3, 4)).num_bytes == 2 * 48 + 12
    assert cost(aten.copy_.default, values, values.half()).num_bytes == 48 + 24
    assert cost(aten.zero_.default, values).num_bytes == 48
    assert cost(aten.zeros_like.default, values).num_bytes == 48
    assert cost(aten.embedding.default, torch.ones(1000, 4), torch.zeros(3, dtype=torch.long)).num_bytes == 2 * 48 + 24
    rows, ids = torch.ones(1000, 4), torch.tensor([1, 5, 7])
    assert cost(aten.index_select.default, rows, 0, ids).num_bytes == 2 * 48 + 24
    assert cost(aten.index_copy_.default, rows, 0, ids, values).num_bytes == 2 * 48 + 24
    assert cost(aten.add.Tensor, values, values).kernels == 1


@pytest.mark.parametrize("name", ["t", "detach", "_unsafe_view", "empty_like"])
def test_what_moves_no_bytes_takes_time_of_the_host_alone(name: str) -> None:
    arguments = ([4, 3],) if name == "_unsafe_view" else ()
    operation = cost(getattr(torch.ops.aten, name).default, torch.ones(3, 4), *arguments)
    assert (operation.flops, operation.num_bytes, operation.kernels) == (0, 0, 0)


def test_an_operator_that_no_rule_knows_is_counted_by_its_bytes_and_named() -> None:
    operation = cost(torch.ops.qlora_tests.unknown.default, torch.ones(3, 4), torch.ones(3, 4))
    assert (operation.operator, operation.is_known) == ("qlora_tests::unknown", False)
    assert (operation.flops, operation.num_bytes, operation.kernels) == (0, 3 * 48, 1)


def test_a_product_of_an_adapted_layer_is_the_adapters_if_it_is_narrow() -> None:
    mm, owner = torch.ops.aten.mm.default, Owner(OperationKind.LORA, width=64)
    base = cost(mm, torch.ones(TOKENS, 64), torch.ones(64, 128), owner=owner)
    assert (base.kind, base.flops) == (OperationKind.BASE_GEMM, 2 * TOKENS * 64 * 128)
    for first, second in (((TOKENS, 64), (64, RANK)), ((TOKENS, RANK), (RANK, 128)), ((RANK, TOKENS), (TOKENS, 64))):
        assert cost(mm, torch.ones(first), torch.ones(second), owner=owner).kind == OperationKind.LORA_GEMM
    added = cost(torch.ops.aten.addmm.default, torch.ones(128), torch.ones(TOKENS, 64), torch.ones(64, 128))
    assert (added.flops, added.num_bytes) == (base.flops, base.num_bytes + 4 * 128)


def test_the_position_of_is_causal_is_that_of_pytorchs_kernels() -> None:
    kernels = {"flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"}
    for kernel in kernels:
        forward, backward = next(at for name, at in CAUSAL_AT.items() if name in kernel)
        for end, position in (("", forward), ("_backward", backward)):
            operator = getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{end}").default
            names = [argument.name for argument in operator._schema.arguments]
            assert names[position] == "is_causal", (kernel, end)
            assert names[bool(end) : bool(end) + 3] == ["query", "key", "value"]
