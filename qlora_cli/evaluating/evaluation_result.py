"""The result of an evaluation, in plain numbers. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["model", "base", "adapter", "unquantized", "merged"]


RowsOfAnswers = Literal["pairs", "labels"]


@dataclass(frozen=True, kw_only=True)
class PreferenceResult:
    """What a model makes of answers that are compared; standard errors are over rows, None for a single one.

    Rewards are `beta` times how much more likely, in nats, an answer is than by the base; of ORPO, times the
    log-probability of a token. Those of KTO take its baseline as given.

    Attributes:
        loss, loss_stderr: The mean loss of the objective over the rows; None if it has none for them, or not finite.
        accuracy, accuracy_stderr: Share of pairs whose chosen answer has the higher reward; of answers with labels,
            of those whose reward is on the side of the baseline that their label asks for.
        margin, margin_stderr: The mean reward of chosen or wanted answers less that of the others.
        chosen_reward, chosen_reward_stderr: The mean reward of chosen or wanted answers.
        rejected_reward, rejected_reward_stderr: The mean reward of the others.
        kl: The mean baseline of answers with labels, in nats; None of pairs.
    """

    loss: float | None
    loss_stderr: float | None
    accuracy: float
    accuracy_stderr: float | None
    margin: float | None
    margin_stderr: float | None
    chosen_reward: float | None
    chosen_reward_stderr: float | None
    rejected_reward: float | None
    rejected_reward_stderr: float | None
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class EvaluatedAnswers:
    """How answers are compared: rows are `pairs` or have `labels`; `objective` is that of the run, `sft` of others."""

    rows: RowsOfAnswers
    num_rows: int
    objective: str
    beta: float


@dataclass(frozen=True, kw_only=True)
class SourceResult:
    """The figures of one model on the rows. Losses are means over all trained tokens, independent of batching.

    Of rows whose answers are compared, they are those of the chosen or wanted answers by themselves.

    Attributes:
        source: The kind of model; `model` is one without an adapter, `unquantized` the requested model on its base as
            it was before quantization.
        path: Its name: a directory, or a hub id.
        quantization: How its linear layers are stored.
        loss: Mean negative log-likelihood of a token, in nats; None if it is not finite.
        loss_stderr: Standard error of the loss, over rows; None for a single row.
        perplexity: exp(loss); None if it is not finite.
        token_accuracy: Share of trained tokens that are the most likely token.
        num_rows, num_tokens: Rows, and trained tokens in them.
        seconds: The time of the evaluation, without loading.
        tokens_per_second: All tokens of the rows per second, without padding.
        difference: The loss minus that of the base; None without a base.
        difference_stderr: Standard error of the difference, paired by row.
        preference: What it makes of answers that are compared; None of other rows, of a model that they are compared
            by, and without one.
    """

    source: Kind
    path: str
    quantization: str
    loss: float | None
    loss_stderr: float | None
    perplexity: float | None
    token_accuracy: float
    num_rows: int
    num_tokens: int
    seconds: float
    tokens_per_second: float
    difference: float | None
    difference_stderr: float | None
    preference: PreferenceResult | None = None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One figure of one of lm-eval's tasks for one model; `metric` is lm-eval's name, with its filter."""

    source: Kind
    task: str
    metric: str
    value: float | None
    stderr: float | None
    num_documents: int | None


@dataclass(frozen=True, kw_only=True)
class QuantizationCost:
    """What a model lost by the quantization of its base, on the trained tokens of the rows; None if not finite.

    Attributes:
        source, quantization: The quantized model, and how its linear layers are stored.
        num_tokens: The tokens whose predictions were compared.
        loss_difference: Its loss minus that of the unquantized model, in nats.
        loss_difference_stderr: Standard error of the difference, paired by row; None for a single row.
        mean_kl: The divergence (Kullback-Leibler) of its predictions from the unquantized model's, in nats a token.
        mean_kl_stderr: Standard error of the divergence, over rows; None for a single row.
        top_token_agreement: Share of tokens that both predict the same most likely token for.
    """

    source: Kind
    quantization: str
    num_tokens: int
    loss_difference: float | None
    loss_difference_stderr: float | None
    mean_kl: float | None
    mean_kl_stderr: float | None
    top_token_agreement: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of `qlora evaluate`.

    Attributes:
        model: The name that was given.
        base_model: Its base: the same, unless it is an adapter or a run.
        adapter: The adapter, if it is or has one.
        adapter_step: For a run, the step of its weights.
        run_is_done: Whether that run was trained to its end.
        merged: The merged model, if one was compared.
        device, compute_dtype: The device and the dtype of the computation.
        dataset: The rows, as they were named; None if only tasks were run.
        fingerprint: A SHA-256 over the tokens and labels of the rows.
        is_training_data: Whether the adapter is known to have been trained on that data.
        sources: The result of each model, the base first.
        compared_answers: How answers are compared; None of other rows.
        quantization_cost: What the model lost by quantization, if it was evaluated unquantized, too.
        tasks: The figures of lm-eval.
        notes: Notes for reading the figures.
    """

    model: str
    base_model: str
    adapter: Path | None
    adapter_step: int | None = None
    run_is_done: bool | None = None
    merged: Path | None
    device: str
    compute_dtype: str
    dataset: str | None
    fingerprint: str | None
    is_training_data: bool
    sources: tuple[SourceResult, ...]
    compared_answers: EvaluatedAnswers | None = None
    quantization_cost: QuantizationCost | None = None
    tasks: tuple[TaskResult, ...]
    notes: tuple[str, ...]
