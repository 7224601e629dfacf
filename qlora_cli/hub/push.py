"""Push results to the hub; whether that is allowed is checked before anything is loaded.

Imports no torch, and the hub's client only if something is to be pushed.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora_cli.errors import PushError, QloraError, UsageError
from qlora_cli.events import Noted, PhaseStarted, Reporter
from qlora_cli.hub.http_failures import http_error_type
from qlora_cli.settings.sections.pushing import Pushed

LOG_IN = "Run: hf auth login (with a token that can write), or set HF_TOKEN."
# An adapter or a model, configs, the tokenizer and its chat template.
PUSHED = ("README.md", "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
WRITES, CAN_WRITE = "repo.write", {"admin", "write", "contributor"}  # a permission of tokens, roles in organizations


def push_problem(output: Pushed, folder: Path = Path("RUN/adapter")) -> QloraError | None:
    """Return why `folder` can't be pushed, as far as that is known without asking the hub."""
    if output.push_to_hub is None:
        return None
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # lazy there

    owner, slash, name = output.push_to_hub.partition("/")
    try:
        validate_repo_id(output.push_to_hub)
    except HFValidationError as error:
        return QloraError(f"{output.push_to_hub!r} is no name of a repository: {error}", hint="Give OWNER/NAME.")
    if not (owner and slash and name):
        hint = "Give OWNER/NAME: your name on the hub, or an organization's, before the slash."
        return QloraError(f"{output.push_to_hub!r} does not say whose repository it is", hint=hint)
    if constants.HF_HUB_OFFLINE:
        hint = f"Unset HF_HUB_OFFLINE, or push later: {push_command(output, folder)}"
        return QloraError("nothing can be pushed to the hub offline, and HF_HUB_OFFLINE is set", hint=hint)
    if get_token() is None:
        return QloraError(f"{output.push_to_hub} can't be pushed to without a login to the hub", hint=LOG_IN)
    return None


def check_push(output: Pushed, setting: str, reporter: Reporter) -> None:
    """Ask the hub whether the token may write to the repository that `setting` names, as far as it says.

    Raises:
        UsageError: the token is not valid, or may not write there.
    """
    if refusal := _refusal(output, reporter):
        raise UsageError(refusal.message, hint=refusal.hint, setting=setting)


def _refusal(output: Pushed, reporter: Reporter) -> QloraError | None:
    """Return why the token may not write to the repository of the settings, if the hub says so.

    A hub that can't be reached now may be at the end, so that is a warning only.
    """
    if output.push_to_hub is None:
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return _missing_right(HfApi().whoami(), output.push_to_hub)
    except HfHubHTTPError as error:
        if error.response.status_code in {401, 403}:
            return QloraError("the hub does not accept the token that is set or stored", hint=LOG_IN)
        _warn(reporter, f"HTTP {error.response.status_code}", output)
    except (http_error_type(), OSError, ValueError) as error:
        # The text may quote the header with the token.
        _warn(reporter, type(error).__name__, output)
    return None


def _warn(reporter: Reporter, reason: str, output: Pushed) -> None:
    message = f"the hub did not say whether {output.push_to_hub} can be pushed to ({reason}); it is tried at the end"
    reporter.report(Noted(level="warning", message=message))


def _missing_right(who: Mapping[str, Any], repository: str) -> QloraError | None:
    """Return which right the account or its token lacks to write to `repository`; None if none is known to be.

    `who` is the response of `whoami-v2`.
    """
    owner = repository.partition("/")[0]
    roles = {who.get("name"): "admin", **{one.get("name"): one.get("roleInOrg") for one in who.get("orgs") or ()}}
    if owner not in roles:
        mine = ", ".join(sorted(name for name in roles if name))
        hint = f"Push to one of: {mine}; or log in with another token: hf auth login"
        return QloraError(
            f"the token is that of {who.get('name')}, who can't write to repositories of {owner}", hint=hint
        )
    if roles[owner] is not None and roles[owner] not in CAN_WRITE:
        return QloraError(f"{who.get('name')} may only read in {owner}", hint="Ask its owners for the right to write.")
    token = (who.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        return QloraError("the token of the hub can only read", hint=LOG_IN)
    if token.get("role") == "fineGrained" and not _is_granted(token.get("fineGrained") or {}, owner, repository):
        hint = "Give it write access at https://huggingface.co/settings/tokens, or use another: hf auth login"
        return QloraError(f"the token of the hub may not write to repositories of {owner}", hint=hint)
    return None


def _is_granted(fine: Mapping[str, Any], owner: str, repository: str) -> bool:
    """Return whether a fine-grained token may write to a repository, or does not list its rights."""
    scopes = fine.get("scoped")
    if not isinstance(scopes, list) or WRITES in (fine.get("global") or ()):
        return True
    return any(
        WRITES in (scope.get("permissions") or ()) and (scope.get("entity") or {}).get("name") in {owner, repository}
        for scope in scopes
    )


def push_adapter(output: Pushed, adapter: Path, reporter: Reporter) -> str:
    """Push the content of `adapter` to the repository in the settings, created if necessary; return its address.

    Raises:
        PushError: it can't be pushed; the hint is the command that pushes it later.
    """
    return push_folder(output, adapter, PUSHED, "the run is done, but its adapter", reporter)


def push_folder(output: Pushed, folder: Path, patterns: Sequence[str], what: str, reporter: Reporter) -> str:
    """Push the files in `folder` that match `patterns`; return the address. `what` is the subject of an error.

    Raises:
        PushError: it can't be pushed; the hint is the command that pushes it later.
    """
    from huggingface_hub import HfApi

    repository = output.push_to_hub
    assert repository is not None, "there is nowhere to push to"
    reporter.report(PhaseStarted(title=f"Pushing {folder} to {repository}"))
    try:
        with _without_bars():
            api = HfApi()
            address = api.create_repo(repository, private=output.hub_private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                allow_patterns=list(patterns),
                commit_message="Upload by qlora",
            )
    except (http_error_type(), OSError, ValueError, RuntimeError) as error:  # the last, of single files
        raise PushError(
            f"{what} was not pushed to {repository}: {_describe(error)}",
            hint=f"Push it later: {push_command(output, folder)}",
        ) from None  # the client's error quotes what it sent
    reporter.report(Noted(message=f"{folder} is at {address}"))
    return str(address)


def push_command(output: Pushed, adapter: Path) -> str:
    """Return the command that pushes `adapter` by hand."""
    private = " --private" if output.hub_private else ""
    return f"hf upload {output.push_to_hub} {shlex.quote(str(adapter))}{private}"


def _describe(error: Exception) -> str:
    """Return the first line of an error, and of what caused it, without the token, should it quote one."""
    from huggingface_hub import get_token

    errors = (error, error.__cause__) if isinstance(error, RuntimeError) and error.__cause__ else (error,)
    text = ": ".join((str(one).strip().splitlines() or [type(one).__name__])[0].rstrip(".") for one in errors)
    token = get_token()
    return text.replace(token, "<token>") if token else text


@contextmanager
def _without_bars() -> Iterator[None]:
    """Disable the client's progress bars, which would be drawn over ours."""
    from huggingface_hub import utils

    if utils.are_progress_bars_disabled():  # type: ignore[attr-defined] # lazy there
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]
