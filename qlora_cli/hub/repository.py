"""Open repositories of the hub and download their files; all failures are errors with a hint.

The order is fixed: ask the hub; if it can't be reached, use the cache if that is complete; otherwise report why the
hub could not be reached, not what the cache lacks.
"""

import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

from qlora_cli.errors import DiskSpaceError, ModelError, ModelNotFoundError, OutputDirectoryError, QloraError
from qlora_cli.events import Noted, Reporter
from qlora_cli.hub.download import WITHOUT_XET, RemoteFile, download
from qlora_cli.hub.http_failures import (
    Retry,
    ask_again,
    describe_failure,
    http_error_type,
    is_lost_connection,
    is_passing_status,
)
from qlora_cli.units import format_bytes

ETAG = re.compile(r"[\w.-]+")
COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_RETRY = Retry()


@dataclass(frozen=True, kw_only=True)
class Repository:
    """A repository at a commit. `unreachable` says why the cache listed its files instead of the hub."""

    name: str
    revision: str | None
    commit: str
    file_names: frozenset[str]
    unreachable: str | None = None

    @property
    def snapshot(self) -> Path:
        """The folder of this commit in the cache; it may lack files."""
        return _cache_folder(self.name) / "snapshots" / self.commit


def open_repository(name: str, revision: str | None, reporter: Reporter, retry: Retry = DEFAULT_RETRY) -> Repository:
    """Resolve `revision` to its commit and list the files; from the cache if the hub can't be reached.

    Raises:
        ModelNotFoundError: no such repository or revision, no access, or no way to ask and nothing in the cache.
    """
    from huggingface_hub import HfApi, constants

    ask = partial(HfApi().model_info, name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    try:
        with _explained(name, revision):
            info = ask_again(ask, name, reporter, retry)
    except _HubUnreachableError as error:
        return _open_cached(name, revision, error, reporter)
    except (ValueError, KeyError, TypeError) as error:  # not an answer of the hub, but of a proxy, for example
        raise _no_hub(name, f"{type(error).__name__}: {error}") from error
    names = frozenset(sibling.rfilename for sibling in info.siblings or ())
    if info.sha is None:
        raise _no_hub(name, "it names no commit")
    return Repository(name=name, revision=revision, commit=info.sha, file_names=names)


def fetch_files(
    repository: Repository, names: Collection[str], reporter: Reporter, retry: Retry = DEFAULT_RETRY
) -> Path:
    """Return the folder that contains `names`; those that the cache lacks are downloaded.

    Raises:
        ModelNotFoundError: the hub can't be reached, or refuses them.
        DiskSpaceError: they do not fit on the disk of the cache.
    """
    missing = _missing(repository, names)
    if repository.unreachable is not None:
        return repository.snapshot.resolve()
    with _downloading(repository):
        _fetch_missing(repository, missing, reporter, retry)
        path = _complete_snapshot(repository, names)
    if path != repository.snapshot.resolve():
        raise ModelError(f"{repository.name} was changed on the hub while it was downloaded", hint="Run it again.")
    return path


def check_download(
    repository: Repository, names: Collection[str], reporter: Reporter, retry: Retry = DEFAULT_RETRY
) -> bool:
    """Check that `names` can be downloaded; return whether any of them still has to be.

    Raises:
        ModelNotFoundError: the hub can't be reached, or refuses them.
        DiskSpaceError: they do not fit on the disk of the cache.
        OutputDirectoryError: the cache can't be written to.
    """
    missing = _missing(repository, names)
    with _downloading(repository):
        _check_disk(repository.name, [_describe_file(repository, name, reporter, retry) for name in missing])
    return bool(missing)


@contextmanager
def _downloading(repository: Repository) -> Iterator[None]:
    """Convert errors of downloads to our own."""
    try:
        with _explained(repository.name, repository.revision):
            yield
    except _HubUnreachableError as error:
        raise ModelNotFoundError(
            f"the download of {repository.name} is incomplete: {error}",
            hint="Run it again: complete files are not downloaded again.",
        ) from error
    except QloraError:
        raise
    except RuntimeError as error:  # of xet
        raise ModelNotFoundError(
            f"the download of {repository.name} is incomplete: {describe_failure(error)}",
            hint=f"Run it again, or do without xet: {WITHOUT_XET}.",
        ) from error
    except ValueError as error:  # of the client: a file that is too large for HTTP, or an answer that it can't read
        raise ModelError(
            f"{repository.name} can't be downloaded: {error}",
            hint="Files above 50 GB need hf_xet: pip install hf_xet, and HF_HUB_DISABLE_XET not set.",
        ) from error


def _missing(repository: Repository, names: Collection[str]) -> list[str]:
    """Return those of `names` that are not in the cache.

    Raises:
        ModelNotFoundError: some are not, and the hub could not be reached.
    """
    missing = sorted(name for name in names if not (repository.snapshot / name).is_file())
    if repository.unreachable is not None and missing:
        raise _incomplete(repository, missing)
    return missing


def _complete_snapshot(repository: Repository, names: Collection[str]) -> Path:
    """Return the folder of `names`, all of which are in the cache, after noting branch and listing for offline use."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined] # public, but named lazily

    silent: Any = partial(tqdm, disable=True)
    patterns = [escape(name) for name in names]
    path = snapshot_download(repository.name, revision=repository.revision, allow_patterns=patterns, tqdm_class=silent)
    return Path(path).resolve()


class _HubUnreachableError(QloraError):
    """The hub can't be reached or does not work; the message says why."""


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Convert errors of huggingface_hub and its HTTP client to our own."""
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (http_error_type(), OSError, HFValidationError) as error:
        explained = _explain(error, name, revision)
        if explained is None:
            raise
        raise explained from error


def _explain(error: Exception, name: str, revision: str | None) -> QloraError | None:
    """Return our own error for one of the client; None if it is not about the hub, such as a full disk."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return ModelNotFoundError(
            f"{name} is gated: this account has no access to it",
            hint=f"Ask for access at https://huggingface.co/{name}, then run: hf auth login",
        )
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return ModelNotFoundError(
            f"no model at {name!r}: no such directory, and no such repository on the hub",
            hint="Check the name; for a private repository run: hf auth login",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelNotFoundError(f"{name} has no revision {revision!r}", hint="Give a branch, tag or commit.")
    if isinstance(error, errors.OfflineModeIsEnabled):
        hint = "Check the path; or download it once, with HF_HUB_OFFLINE=0."
        return _HubUnreachableError("HF_HUB_OFFLINE=1 keeps the hub from being asked", hint=hint)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        return _explain(error.__cause__, name, revision)  # the reason why the client used its cache
    if isinstance(error, errors.FileMetadataError):
        return _no_hub(name, str(error))
    if is_lost_connection(error):
        hint = "Check the path or the network, and HF_ENDPOINT and the proxy if they are set."
        return _HubUnreachableError(f"the hub can't be reached ({describe_failure(error)})", hint=hint)
    if is_passing_status(error):
        return _HubUnreachableError(describe_failure(error), hint="Try again later.")
    if isinstance(error, errors.HfHubHTTPError):
        return ModelNotFoundError(
            f"the hub refuses {name}: {describe_failure(error)}",
            hint="If your token has expired or lacks the right to read, run: hf auth login",
        )
    if isinstance(error, OSError) and not isinstance(error, QloraError) and error.errno is None:
        return _HubUnreachableError(str(error).partition("\n")[0])  # the client's own: fewer bytes than announced
    return None


def _no_hub(name: str, why: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the answer for {name} is not from a hub: {why}", hint="Check HF_ENDPOINT and the proxy settings."
    )


def _open_cached(name: str, revision: str | None, unreachable: _HubUnreachableError, reporter: Reporter) -> Repository:
    from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        raise ModelNotFoundError(
            f"no model at {name!r}: no such directory, not in the local cache, and {unreachable}",
            hint=unreachable.hint,
        ) from unreachable
    try:
        names = frozenset(file.path for file in get_cached_repo_tree(name, revision=path.name))
    except CachedRepoTreeNotFoundError:
        # An older client cached no listing: only the files in the cache are known.
        names = frozenset(file.relative_to(path).as_posix() for file in path.rglob("*"))
    if not constants.HF_HUB_OFFLINE:
        reporter.report(
            Noted(level="warning", message=f"{unreachable}; using {name} in the local cache, at {path.name[:12]}")
        )
    return Repository(name=name, revision=revision, commit=path.name, file_names=names, unreachable=str(unreachable))


def _incomplete(repository: Repository, missing: list[str]) -> ModelNotFoundError:
    more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
    return ModelNotFoundError(
        f"{repository.unreachable}, "
        f"and the local cache has {repository.name} only in part: {missing[0]}{more} missing",
        hint="Run it again when the hub can be reached; existing files are not downloaded again.",
    )


def _fetch_missing(repository: Repository, missing: list[str], reporter: Reporter, retry: Retry) -> None:
    files = [_describe_file(repository, name, reporter, retry) for name in missing]
    _check_disk(repository.name, files)
    download(repository.name, repository.commit, files, reporter, retry)


def _describe_file(repository: Repository, name: str, reporter: Reporter, retry: Retry) -> RemoteFile:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repository.name, name, revision=repository.commit)
    metadata: Any = ask_again(partial(get_hf_file_metadata, url), name, reporter, retry)
    if not metadata.etag or not ETAG.fullmatch(metadata.etag):
        raise _no_hub(repository.name, f"{name} has no proper ETag")
    blob = _cache_folder(repository.name) / "blobs" / metadata.etag
    return RemoteFile(name=name, num_bytes=metadata.size, blob=blob)


def cached_snapshot(name: str) -> Path | None:
    """Return the folder of the newest commit of a repository in the cache, which may lack files; None without one."""
    folder = _cache_folder(name)
    try:
        commit = (folder / "refs" / "main").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def _cache_folder(name: str) -> Path:
    from huggingface_hub import constants  # its function for the name takes a third of a second to import

    return Path(constants.HF_HUB_CACHE) / "--".join(["models", *name.split("/")])


def _check_disk(name: str, files: Collection[RemoteFile]) -> None:
    """Check that a download fits on the disk of the cache; complete files need no more space.

    Raises:
        DiskSpaceError: with both numbers.
        OutputDirectoryError: the cache can't be written to.
    """
    needed = sum(max(0, (file.num_bytes or 0) - file.present_bytes) for file in files)
    if not needed:
        return
    folder = _cache_folder(name).parent
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    if not disk.is_dir() or not os.access(disk, os.W_OK):
        raise OutputDirectoryError(
            f"{name} can't be downloaded: the cache {folder} can't be written to",
            hint="Set HF_HOME to a directory that can be written to.",
        )
    if (free := shutil.disk_usage(disk).free) < needed:
        raise DiskSpaceError(
            f"downloading {name} takes {format_bytes(needed)}, and the disk of {folder} has {format_bytes(free)} free",
            hint="Free disk space there, or set HF_HOME to a directory on a larger disk.",
        )
