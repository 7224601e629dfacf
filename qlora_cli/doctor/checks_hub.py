"""Check the hub, its token and the free disk space. Of the token, only its source is shown."""

import os
import shutil
from pathlib import Path
from urllib.parse import urlsplit

from qlora_cli.doctor.findings import Json, Outcome, ok, skipped, warning
from qlora_cli.files import existing_parent
from qlora_cli.units import GIB, format_bytes

HUB_SECONDS = 5.0
# In the order of precedence in the client.
TOKEN_VARIABLES = ("HF_OIDC_RESOURCE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
OTHER_SOURCES = {"file": "the file of hf auth login", "other": "this environment's secrets"}
CACHE_WANTED_BYTES = 20 * GIB  # an 8B model in 16 bit is 16 GB to download
HERE_WANTED_BYTES = 2 * GIB  # a run's checkpoints at a large rank
LOG_IN = "Log in: hf auth login"


def hub_address() -> str:
    """Return the client's address of the hub, without a user or password."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def check_hub() -> Outcome:
    """Request a model from the hub, with the client that downloads models."""
    from huggingface_hub import constants

    address = hub_address()
    if constants.HF_HUB_OFFLINE:
        return skipped(
            "offline mode (HF_HUB_OFFLINE=1): only models on this disk are found",
            "Unset HF_HUB_OFFLINE to use the hub.",
            endpoint=address,
            offline=True,
        )
    status, seconds, answer = _get("/api/models?limit=1", token=False)
    details: dict[str, Json] = {
        "endpoint": address,
        "offline": False,
        "http_status": status,
        "answer_seconds": seconds,
    }
    if status is None:
        return warning(
            f"{address} can't be reached: {answer}",
            "Check the network, the proxy and HF_ENDPOINT. Models on this disk need no hub.",
            **details,
        )
    if status != 200 or not isinstance(answer, list):
        return warning(
            f"{address} answers, but not like the hub (HTTP {status})",
            "Check HF_ENDPOINT, and whether the network asks for a login in a browser; or try again later.",
            **details,
        )
    return ok(f"{address} answered in {seconds:.2f} s", **details)


def check_token(ask_hub: bool) -> Outcome:
    """Look for the token and, if the hub can be reached, check whether it accepts it."""
    from huggingface_hub import constants, get_token

    token = get_token()
    if token is None and constants.HF_HUB_OFFLINE:
        return skipped("none, and offline none is needed", LOG_IN, source=None, accepted=None)
    if token is None:
        return warning("none: gated and private models can't be downloaded", LOG_IN, source=None, accepted=None)
    source = _source_of_token(Path(constants.HF_TOKEN_PATH))
    presence = f"present, from {OTHER_SOURCES.get(source, source)}"
    if not ask_hub:
        return ok(f"{presence}; not tried, see hub", source=source, accepted=None)
    status, _, answer = _get("/api/whoami-v2", token=token)
    if status == 200 and isinstance(answer, dict):
        return ok(f"{presence}; the hub accepts it", source=source, accepted=True)
    if status in {401, 403}:
        advice = f"Correct {source}, or unset it." if source in TOKEN_VARIABLES else LOG_IN
        return warning(f"{presence}, but the hub rejects it (HTTP {status})", advice, source=source, accepted=False)
    why = answer if status is None else f"HTTP {status}"
    return warning(
        f"{presence}; the hub did not say whether it accepts it ({why})",
        "Try again later, or set the token again: hf auth login",
        source=source,
        accepted=None,
    )


def _source_of_token(path: Path) -> str:
    for name in TOKEN_VARIABLES:
        if os.environ.get(name, "").strip():
            return name
    return "file" if path.is_file() else "other"


def _get(path: str, *, token: str | bool) -> tuple[int | None, float | None, object]:
    """Return the status, the seconds and the JSON of an answer; without one, None, None and the kind of error.

    With a token the error's text is dropped, because the client may quote the header.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, httpx  # type: ignore[attr-defined] # lazy there

    headers = build_hf_headers(token=token)
    try:
        answer = get_session().get(f"{constants.ENDPOINT}{path}", headers=headers, timeout=HUB_SECONDS)
    except httpx.TransportError as error:
        return None, None, type(error).__name__ if token else f"{type(error).__name__}: {error}"
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        return None, None, type(error).__name__
    try:
        return answer.status_code, answer.elapsed.total_seconds(), answer.json()
    except ValueError:  # not JSON, but a login page, for example
        return answer.status_code, answer.elapsed.total_seconds(), None


def check_disk() -> Outcome:
    """Check the free space in the cache of models, and in the current directory."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    here = Path.cwd()
    cache_free, here_free = (shutil.disk_usage(existing_parent(path)).free for path in (cache, here))
    outcome = judge_disk(cache, cache_free, here_free)
    if not os.access(existing_parent(cache), os.W_OK):
        return warning(f"can't write to the cache {cache}", "Set HF_HOME to another directory.", **outcome.details)
    if not os.access(here, os.W_OK):
        return warning("can't write to this directory", "Give --output in another one.", **outcome.details)
    return outcome


def judge_disk(cache: Path, cache_free_bytes: int, here_free_bytes: int) -> Outcome:
    """Return a warning if a model of common size, or the checkpoints of a run, may not fit."""
    details: dict[str, Json] = {
        "cache": str(cache),
        "cache_free_bytes": cache_free_bytes,
        "current_directory_free_bytes": here_free_bytes,
    }
    finding = f"{format_bytes(cache_free_bytes)} free in the cache {cache}, {format_bytes(here_free_bytes)} here"
    if cache_free_bytes < CACHE_WANTED_BYTES:
        return warning(finding, "An 8B model takes 16 GB: free some, or set HF_HOME to a larger disk.", **details)
    if here_free_bytes < HERE_WANTED_BYTES:
        return warning(finding, "Checkpoints may not fit: free some, or give --output on a larger disk.", **details)
    return ok(finding, **details)
