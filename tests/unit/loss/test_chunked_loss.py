"""The loss by chunks of tokens: values, metrics and gradients like PyTorch's in fp64, and like TRL's in 16 bit."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from qlora_cli.loss import chunked_loss
from qlora_cli.loss.chunked_loss import MIB, TokenLosses, block_tokens, chunk_tokens, token_losses, trained_tokens
from qlora_cli.loss.output_head import HeadRows, OutputHead
from qlora_cli.memory.tracing.kernels import Kernels
from qlora_cli.memory.tracing.trace import MemoryTrace

IGNORED = -100


@dataclass(frozen=True)
class Case:
    """Hidden states, `(batch, seq, hidden)`, labels, and a head whose parts are trained or not."""

    hidden: torch.Tensor
    labels: torch.Tensor
    head: OutputHead
    weighs_by_probability: bool = False

    @property
    def trained(self) -> dict[str, torch.Tensor]:
        """The tensors that require a gradient, by name."""
        rows = self.head.rows
        parts = {"weight": self.head.weight, "bias": self.head.bias, "rows": None if rows is None else rows.values}
        named = {"hidden": self.hidden, **parts}
        return {name: one for name, one in named.items() if one is not None and one.requires_grad}

    def losses(self, dtype: torch.dtype = torch.float32) -> TokenLosses:
        """Return the losses of the trained tokens."""
        tokens = trained_tokens(self.labels)
        return token_losses(self.hidden, self.head, *tokens, dtype, weighs_by_probability=self.weighs_by_probability)

    def gradients(self, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Return the gradients of `factor` times the summed loss."""
        trained = self.trained
        made = torch.autograd.grad(self.losses(dtype).total * factor, list(trained.values()))
        return dict(zip(trained, made, strict=True))

    def exact(self, factor: float = 1.0) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the logits of the trained tokens, and gradients, as PyTorch computes them in fp64."""
        leaves = {name: one.detach().double().requires_grad_() for name, one in self.trained.items()}
        head, rows = self.head, self.head.rows
        weight = leaves.get("weight", head.weight.detach().double())
        if rows is not None:
            weight = weight.index_copy(0, torch.tensor(rows.ids), leaves.get("rows", rows.values.detach().double()))
        logits = leaves.get("hidden", self.hidden.detach().double()) @ weight.t()
        if head.bias is not None:
            logits = logits + leaves.get("bias", head.bias.detach().double())
        logits = logits * head.scale
        if head.soft_cap is not None:
            logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
        shifted, targets = logits[:, :-1].flatten(0, 1), self.labels[:, 1:].flatten()
        losses = cross_entropy(shifted, targets, reduction="none", ignore_index=IGNORED)
        if self.weighs_by_probability:
            losses = losses * torch.exp(-losses.detach())
        loss = losses.sum() * factor
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return shifted[targets != IGNORED].detach(), dict(zip(leaves, gradients, strict=True))

    @property
    def targets(self) -> torch.Tensor:
        """The labels that are trained, `(tokens,)`."""
        shifted = self.labels[:, 1:].flatten()
        return shifted[shifted != IGNORED]


def make_case(
    *,
    batch: int = 2,
    length: int = 9,
    hidden: int = 16,
    vocabulary: int = 40,
    ignored: float = 0.3,
    trains: tuple[str, ...] = ("hidden",),
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """Draw a case; `trains` may name `hidden`, `weight`, `bias` and `rows`, and the last two exist only if named."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    labels = torch.randint(0, vocabulary, (batch, length), generator=draw)
    labels[torch.rand(labels.shape, generator=draw) < ignored] = IGNORED
    rows = None
    if "rows" in trains:
        rows = HeadRows(ids=[vocabulary - 1, 0], values=normal(2, hidden).requires_grad_())
    return Case(
        hidden=normal(batch, length, hidden).to(dtype).requires_grad_("hidden" in trains),
        labels=labels,
        head=OutputHead(
            weight=normal(vocabulary, hidden).to(dtype).requires_grad_("weight" in trains),
            bias=normal(vocabulary).requires_grad_() if "bias" in trains else None,
            rows=rows,
            scale=scale,
            soft_cap=soft_cap,
        ),
    )


@given(
    sizes=st.tuples(*[st.integers(1, most) for most in (3, 12, 9, 50)]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    trains=st.sets(st.sampled_from(["hidden", "weight", "bias", "rows"]), min_size=1),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    soft_cap=st.sampled_from([None, 2.0, 30.0]),
    weighs_by_probability=st.booleans(),
    chunk_tokens=st.integers(1, 40),
    block_tokens=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
@example(  # logits at the cap
    sizes=(1, 10, 7, 25),
    ignored=0.0,
    trains={"hidden"},
    scale=3.0,
    soft_cap=2.0,
    weighs_by_probability=False,
    chunk_tokens=1,
    block_tokens=1,
    seed=0,
)
def test_losses_metrics_and_gradients_are_those_of_pytorch_in_fp64(
    sizes: tuple[int, ...],
    ignored: float,
    trains: set[str],
    scale: float,
    soft_cap: float | None,
    weighs_by_probability: bool,
    chunk_tokens: int,
    block_tokens: int,
    seed: int,
) -> None:
    batch, length, hidden, vocabulary = sizes
    if {"weight", "rows"} <= trains:  # PEFT trains a head whole, or rows of it
        trains = trains - {"weight"}
    case = make_case(
        batch=batch,
        length=length,
        hidden=hidden,
        vocabulary=vocabulary + 1,
        ignored=ignored,
        trains=tuple(trains),
        scale=scale,
        soft_cap=soft_cap,
        seed=seed,
    )
    case = replace(case, weighs_by_probability=weighs_by_probability)
    row_bytes = (vocabulary + 1) * 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_loss, "CHUNK_BYTES", chunk_tokens * row_bytes)
        patch.setattr(chunked_loss, "CPU_BLOCK_BYTES", block_tokens * row_bytes)
        patch.setattr(chunked_loss, "CHUNK_TOKENS", 1)
        losses, gradients = case.losses(), case.gradients(0.37)
    logits, expected = case.exact(0.37)
    nll = cross_entropy(logits, case.targets, reduction="none")
    assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
    assert_close(losses.nll.double(), nll)
    total = (nll * torch.exp(-nll) if weighs_by_probability else nll).sum()
    torch.testing.assert_close(losses.total.double(), total, rtol=1e-4, atol=1e-3)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    assert_close(losses.entropy.double(), entropy)
    largest = logits.topk(2).values
    is_clear = largest[:, 0] - largest[:, 1] > 1e-5  # a soft cap makes large logits equal in fp32 that are not in fp64
    assert torch.equal(losses.is_top1[is_clear], (logits.argmax(-1) == case.targets)[is_clear])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        exact = expected[name]
        assert_close(gradient.double(), torch.zeros_like(gradient).double() if exact is None else exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("weighs_by_probability", [False, True])
def test_16_bit_is_as_exact_as_trls_loss(
    dtype: torch.dtype, soft_cap: float | None, weighs_by_probability: bool
) -> None:
    case = make_case(batch=1, length=65, hidden=64, vocabulary=3000, ignored=0.0, soft_cap=soft_cap, dtype=dtype)
    case = replace(case, weighs_by_probability=weighs_by_probability)
    factor = 1 / 64
    _, exact = case.exact(factor)
    states = case.hidden.detach()[0, :-1].requires_grad_()
    log_probs = ChunkedLogProbFunction.apply(states, case.head.weight, None, case.targets, 1.0, 32768, soft_cap)[0]
    weights = log_probs.detach().exp() if weighs_by_probability else 1.0
    (by_trl,) = torch.autograd.grad(-(log_probs * weights).sum() * factor, [states])

    def error(gradient: torch.Tensor, of_exact: torch.Tensor) -> float:
        return float((gradient.double() - of_exact).norm() / of_exact.norm())

    ours = error(case.gradients(factor, dtype)["hidden"], exact["hidden"])
    assert ours <= 1.1 * error(by_trl, exact["hidden"][0, :-1])
    assert ours > 0


@pytest.mark.parametrize("trains", [("hidden",), ("hidden", "weight", "bias"), ("rows",)])
def test_a_weighted_loss_is_trls_to_a_millionth(trains: tuple[str, ...]) -> None:
    """By the formula of TRL's trainer: the probabilities are constants, or the gradient would be another one."""
    case = replace(make_case(trains=trains), weighs_by_probability=True)
    trained = case.trained
    weight, rows = case.head.weight, case.head.rows
    if rows is not None:
        weight = weight.index_copy(0, torch.tensor(rows.ids), rows.values)
    positions, targets = trained_tokens(case.labels)
    states = case.hidden.flatten(0, 1)[positions]
    log_probs = ChunkedLogProbFunction.apply(states, weight, case.head.bias, targets, 1.0, 32768, None)[0]
    by_trl = (-log_probs * log_probs.exp().detach()).sum()
    expected = torch.autograd.grad(by_trl, list(trained.values()), retain_graph=True)
    differentiated = torch.autograd.grad((-log_probs * log_probs.exp()).sum(), list(trained.values()))
    torch.testing.assert_close(case.losses().total, by_trl, rtol=1e-6, atol=1e-6)
    for name, gradient in case.gradients().items():
        index = list(trained).index(name)
        torch.testing.assert_close(gradient, expected[index], rtol=1e-5, atol=1e-6)
        assert (gradient - differentiated[index]).abs().max() > 1e-2
        assert (gradient - replace(case, weighs_by_probability=False).gradients()[name]).abs().max() > 1e-2
    with torch.no_grad():
        torch.testing.assert_close(case.losses().total, by_trl, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("factor", [16.0, 4096.0, 65536 / 3000, 1 / 300, 1e-6], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_the_factor_of_a_loss_scaler_neither_overflows_nor_is_rounded_in_fp16(factor: float, scale: float) -> None:
    """The gradient is made before the factor is known: a scale of up to 2**24 over the number of tokens."""
    case = make_case(batch=1, length=33, hidden=64, vocabulary=2000, ignored=0.0, scale=scale, dtype=torch.float16)
    made, plain = (case.gradients(by, torch.float16)["hidden"].double() for by in (factor, 1.0))
    assert made.isfinite().all()
    # Each of the two is rounded once more, by half a step: 2**-11, or 2**-25 below the normal numbers.
    torch.testing.assert_close(made, plain * factor, rtol=2**-10, atol=2**-25 + factor * 2**-25)


def test_probabilities_below_the_normal_numbers_of_fp16_are_not_lost() -> None:
    """Of as many tokens of the same probability, each has 83.5 times the smallest number of fp16."""
    num_tokens, hidden = 200_925, 8
    weight = torch.ones(num_tokens, hidden, dtype=torch.float16)
    states = torch.zeros(1, 2, hidden, dtype=torch.float16, requires_grad=True)
    case = Case(states, torch.tensor([[0, 0]]), OutputHead(weight=weight))
    # Each element is the sum of all probabilities, 1, less that of the target: nothing.
    assert case.gradients(1.0, torch.float16)["hidden"].abs().max() < 2**-9


@pytest.mark.parametrize("trains", [("hidden",), ("hidden", "weight"), ("hidden", "bias"), ("rows",)])
def test_without_a_trained_token_loss_and_gradients_are_zero(trains: tuple[str, ...]) -> None:
    case = make_case(ignored=1.0, trains=trains)
    losses = case.losses()
    assert losses.total == 0
    assert losses.nll.shape == losses.entropy.shape == losses.is_top1.shape == (0,)
    assert all((gradient == 0).all() for gradient in case.gradients().values())


def test_the_first_of_equal_logits_is_the_most_likely() -> None:
    weight = torch.ones(5, 4)
    case = Case(torch.ones(1, 3, 4), torch.tensor([[9, 0, 1]]), OutputHead(weight=weight))
    assert case.losses().is_top1.tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_second_backward_pass_is_an_error(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    losses = case.losses(dtype)
    torch.autograd.backward(losses.total)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.backward(losses.total)
    losses = case.losses(dtype)
    torch.autograd.backward(losses.total, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(losses.total)


def test_without_a_graph_no_gradient_is_made() -> None:
    case = make_case(trains=("hidden", "weight", "bias"))
    with torch.no_grad():
        losses = case.losses()
    assert not losses.total.requires_grad
    torch.testing.assert_close(losses.nll, case.losses().nll, rtol=0, atol=0)
    frozen = make_case(trains=())
    assert not frozen.losses().total.requires_grad


def test_gradients_accumulate_over_micro_batches() -> None:
    case, other = make_case(trains=("weight",)), make_case(trains=(), seed=1)
    other = Case(other.hidden, other.labels, case.head)
    expected = case.gradients()["weight"] + other.gradients()["weight"]
    for one in (case, other):
        torch.autograd.backward(one.losses().total)
    torch.testing.assert_close(case.head.weight.grad, expected)


def test_the_loss_can_be_checkpointed() -> None:
    case = make_case()
    apply: Any = checkpoint
    total = apply(lambda hidden: Case(hidden, case.labels, case.head).losses().total, case.hidden, use_reentrant=False)
    (gradient,) = torch.autograd.grad(total, [case.hidden])
    torch.testing.assert_close(gradient, case.gradients()["hidden"], rtol=0, atol=0)


def test_autocast_does_not_change_what_is_computed_in_fp32() -> None:
    case = make_case(dtype=torch.bfloat16, trains=("hidden", "weight", "bias"))
    expected, gradients = case.losses(torch.bfloat16), case.gradients(1.0, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, by_autocast = case.losses(torch.bfloat16), case.gradients(1.0, torch.bfloat16)
    assert torch.equal(losses.nll, expected.nll)
    assert torch.equal(losses.entropy, expected.entropy)
    assert all(torch.equal(by_autocast[name], gradient) for name, gradient in gradients.items())


@pytest.mark.parametrize("vocabulary", [100, 32_000, 49_152, 128_256, 151_936, 262_144, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_and_blocks_have_bounded_bytes(vocabulary: int, dtype: torch.dtype) -> None:
    tokens = chunk_tokens(vocabulary, dtype)
    assert tokens % 256 == 0
    assert tokens == 256 or 32 * MIB < tokens * vocabulary * dtype.itemsize <= 64 * MIB
    for device, most in (("cpu", 8 * MIB), ("meta", 32 * MIB), ("cuda", 32 * MIB)):
        tokens = block_tokens(vocabulary, torch.device(device))
        assert tokens == 1 or tokens * vocabulary * 4 <= most


@pytest.mark.parametrize("num_tokens", [512, 5000, 20_000])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
def test_the_peak_is_a_chunk_and_blocks_whatever_the_number_of_tokens(num_tokens: int, soft_cap: float | None) -> None:
    hidden, vocabulary, dtype = 4096, 128_256, torch.bfloat16
    states = torch.empty(1, num_tokens, hidden, dtype=dtype, device="meta", requires_grad=True)
    head = OutputHead(weight=torch.empty(vocabulary, hidden, dtype=dtype, device="meta"), soft_cap=soft_cap)
    indices = torch.empty(num_tokens, dtype=torch.long, device="meta")
    trace = MemoryTrace(Kernels((9, 0)))
    for given_tensor in (states, head.weight, indices):
        trace.ignore(given_tensor)
    with trace:
        total = token_losses(states, head, indices, indices, dtype).total
        torch.autograd.backward(total, torch.empty((), device="meta"))
    live = peak = 0
    for segment in trace.segments:
        for event in segment.events:
            live += trace.storages[event].num_bytes if event >= 0 else -trace.storages[~event].num_bytes
            peak = max(peak, live)
    of_hidden = num_tokens * hidden * 2  # the gradient
    of_chunk = 256 * (vocabulary + 2 * hidden) * 2  # logits, hidden states, and their gradient
    blocks = (2 if soft_cap is None else 3) * 32 * MIB
    assert of_hidden + 64 * MIB < peak <= of_hidden + of_chunk + blocks + num_tokens * 40 + MIB


def test_positions_are_those_before_the_labels() -> None:
    labels = torch.tensor([[7, IGNORED, 8, 9], [5, 6, IGNORED, IGNORED]])
    positions, targets = trained_tokens(labels)
    assert positions.tolist() == [1, 2, 4]
    assert targets.tolist() == [8, 9, 6]


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-5, 1e-6), (torch.bfloat16, 0.03, 0.01)])
def test_what_is_computed_of_single_losses_has_the_gradient_of_pytorch(
    dtype: torch.dtype, rtol: float, atol: float
) -> None:
    case = make_case(batch=3, length=11, soft_cap=3.0, scale=0.5)

    def of_sequences(nll: torch.Tensor) -> torch.Tensor:
        first, rest = nll[:7].sum(), nll[7:]
        return torch.sigmoid(first / 10 - rest.sum() / 20) * 3 + rest[0] ** 2

    (made,) = torch.autograd.grad(of_sequences(case.losses(dtype).nll), [case.hidden])
    exact = case.hidden.detach().double().requires_grad_()
    logits = 3 * torch.tanh(exact @ case.head.weight.double().t() * 0.5 / 3)
    shifted, targets = logits[:, :-1].flatten(0, 1), case.labels[:, 1:].flatten()
    nll = cross_entropy(shifted, targets, reduction="none", ignore_index=IGNORED)[targets != IGNORED]
    (expected,) = torch.autograd.grad(of_sequences(nll), [exact])
    torch.testing.assert_close(made.double(), expected, rtol=rtol, atol=atol)
    assert expected.abs().max() > 0.1


def test_single_losses_train_no_part_of_the_head() -> None:
    case = make_case(trains=("hidden", "weight"))
    with pytest.raises(AssertionError, match="factors of their own"):
        torch.autograd.grad(case.losses().nll[0], [case.hidden])
