"""Failed requests to the hub: which are temporary, how they are described, and the retries."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from qlora_cli.events import Noted, Reporter

Answer = TypeVar("Answer")
PASSING_STATUS = {408, 429, 500, 502, 503, 504}


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often a request is retried when the hub is busy or broken: once after each of the waits."""

    waits_seconds: tuple[float, ...] = (1, 2, 4, 8)


def http_error_type() -> type[Exception]:
    """Return the base class of the HTTP client's errors: of httpx or httpx2, whichever huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def is_passing_status(error: BaseException) -> bool:
    """Return whether the server answered that it is busy or broken, which may be temporary."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.status_code in PASSING_STATUS


def is_lost_connection(error: BaseException) -> bool:
    """Return whether there was no answer at all: no network, a timeout, a lost connection."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, http_error_type()) and not isinstance(error, HfHubHTTPError)


def describe_failure(error: BaseException) -> str:
    """Describe a failed request in a few words, without its URL."""
    if is_passing_status(error):
        response: Any = getattr(error, "response")  # noqa: B009 - is_passing_status has seen to it
        return f"the hub answers {response.status_code} {response.reason_phrase}".rstrip()
    words = str(error).splitlines()
    return f"{type(error).__name__}: {words[0]}" if words else type(error).__name__


def ask_again(
    ask: Callable[[], Answer],
    what: str,
    reporter: Reporter,
    retry: Retry,
    may_pass: Callable[[Exception], bool] = is_passing_status,
) -> Answer:
    """Call `ask`, and retry it after errors that `may_pass`; `what` is the subject of the note about each retry.

    By default a lost connection is not retried.

    Raises:
        Exception: of the last call.
    """
    for wait in retry.waits_seconds:
        try:
            return ask()
        except Exception as error:
            if not may_pass(error):
                raise
            message = f"{what}: {describe_failure(error)}; trying again in {wait:g} s"
            reporter.report(Noted(level="warning", message=message))
            time.sleep(wait)
    return ask()
