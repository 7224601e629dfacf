"""The model as lm-eval takes it, which says how far it is. Imported only where lm-eval is installed."""

import time
from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM

from qlora_cli.events import EvaluationAdvanced, Reporter

BATCHES_A_REPORT = 32


class ReportingLM(HFLM):
    """A loaded model that answers requests in parts, so that it can say after each of them how far it is."""

    def __init__(self, *, title: str, reporter: Reporter, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._title = title
        self._reporter = reporter

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:  # noqa: ARG002
        """Return how likely each continuation is."""
        return self._in_parts(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:  # noqa: ARG002
        """Return how likely each text is."""
        return self._in_parts(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:  # noqa: ARG002
        """Return what the model answers."""
        return self._in_parts(super().generate_until, requests)

    def _in_parts(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        replies: list[Any] = []
        size, started = BATCHES_A_REPORT * self.batch_size, time.monotonic()
        for start in range(0, len(requests), size):
            replies += answer(requests[start : start + size], disable_tqdm=True)
            seconds = time.monotonic() - started
            self._reporter.report(
                EvaluationAdvanced(
                    title=self._title,
                    unit="request",
                    num_done=len(replies),
                    num_all=len(requests),
                    seconds_left=seconds * (len(requests) - len(replies)) / len(replies),
                )
            )
        return replies
