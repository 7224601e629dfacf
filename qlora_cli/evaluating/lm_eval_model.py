"""A model for lm-eval that reports its progress. Imported only if lm-eval is installed."""

import time
from collections.abc import Callable
from typing import Any

from lm_eval.models.huggingface import HFLM

from qlora_cli.events import Reporter, WorkAdvanced

BATCHES_A_REPORT = 32


class ReportingLM(HFLM):
    """A loaded model that processes requests in parts, and reports its progress after each."""

    def __init__(self, *, title: str, reporter: Reporter, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._title = title
        self._reporter = reporter

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:  # noqa: ARG002
        """Return the log-likelihood of each continuation."""
        return self._in_parts(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:  # noqa: ARG002
        """Return the log-likelihood of each text."""
        return self._in_parts(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:  # noqa: ARG002
        """Return the answers of the model."""
        return self._in_parts(super().generate_until, requests)

    def _in_parts(self, answer: Callable[..., list[Any]], requests: list[Any]) -> list[Any]:
        results: list[Any] = []
        size, started = BATCHES_A_REPORT * self.batch_size, time.monotonic()
        for start in range(0, len(requests), size):
            results += answer(requests[start : start + size], disable_tqdm=True)
            seconds = time.monotonic() - started
            self._reporter.report(
                WorkAdvanced(
                    title=f"Evaluating {self._title}",
                    unit="request",
                    num_done=len(results),
                    num_all=len(requests),
                    seconds_left=seconds * (len(requests) - len(results)) / len(results),
                )
            )
        return results
