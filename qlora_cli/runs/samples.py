"""The answers of a run to its sample prompts: before training, at the best evaluation, and at the end."""

from dataclasses import dataclass

from qlora_cli.events import SampleDone
from qlora_cli.runs.history import RunHistory


@dataclass(frozen=True, kw_only=True)
class SampleAnswer:
    """An answer after a step; `when` describes the step: the first, the best or the last."""

    step: int
    when: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and its answers, in order of steps."""

    prompt: str
    answers: tuple[SampleAnswer, ...]


def answers_by_prompt(history: RunHistory) -> tuple[Sample, ...]:
    """Return the first answer to each prompt, that at the best evaluation, and the last; each step once."""
    by_prompt: dict[str, dict[int, SampleDone]] = {}
    for sample in history.samples:
        by_prompt.setdefault(sample.prompt, {})[sample.step] = sample
    best_step = history.best.step if history.best else None
    return tuple(Sample(prompt=prompt, answers=_chosen(by_step, best_step)) for prompt, by_step in by_prompt.items())


def _chosen(by_step: dict[int, SampleDone], best_step: int | None) -> tuple[SampleAnswer, ...]:
    steps = {min(by_step), max(by_step)} | ({best_step} & by_step.keys() if best_step is not None else set())
    return tuple(
        SampleAnswer(step=step, when=_when(step, best_step, max(by_step)), text=by_step[step].answer)
        for step in sorted(steps)
    )


def _when(step: int, best_step: int | None, last_step: int) -> str:
    if step == 0:
        return "before training"
    if step == best_step:
        return f"after step {step:,}, the best"
    return f"after step {step:,}, the last" if step == last_step else f"after step {step:,}"
