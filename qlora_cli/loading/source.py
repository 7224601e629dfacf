"""Find the files of a model: a local directory, or a hub id at a revision.

Only safetensors are read. `check_model_name` looks at what can be known at once, without a network and
without torch; `find_model` fetches.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError, ModelNotFoundError, QloraError
from qlora_cli.settings.models import ModelSettings

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# What a causal language model needs, weights only as safetensors. Never *.py, never pickles.
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model's files on this disk and where they came from."""

    name: str
    path: Path
    revision: str | None = None
    commit: str | None = None


def looks_local(name: str) -> bool:
    """Whether `name` can only mean a path: it exists, or is written as one."""
    return name.startswith(("/", "./", "../", "~", "\\")) or name in {".", ".."} or Path(name).expanduser().exists()


def check_model_name(settings: ModelSettings) -> QloraError | None:
    """Return what is wrong with the model's name, as far as this machine can tell at once."""
    name = settings.name
    if looks_local(name):
        return _check_directory(Path(name).expanduser(), settings.revision)
    if not HUB_ID.fullmatch(name):
        return ModelNotFoundError(
            f"no model at {name!r}: no such directory, and not a hub id",
            hint="Give a local directory or a hub id such as meta-llama/Llama-3.1-8B.",
        )
    return None


def _check_directory(path: Path, revision: str | None) -> QloraError | None:
    if not path.exists():
        return ModelNotFoundError(f"no model at {path}: no such directory", hint="Check the path.")
    if not path.is_dir():
        return ModelError(f"{path} is a file", hint="Give the directory that holds config.json and the weights.")
    if revision is not None:
        return ModelError(
            f"a revision ({revision}) has no meaning for the local directory {path}",
            hint="Leave --revision out, or give a hub id.",
        )
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            return ModelError(f"{path} holds an adapter, not a base model", hint="Give its base model.")
        return ModelError(f"{path} has no config.json", hint="Give a directory written by save_pretrained.")
    if not any(path.glob("*.safetensors")):
        pickled = sorted(path.glob("*.bin"))
        found = f"only {pickled[0].name}, a pickle" if pickled else "none"
        return ModelError(
            f"{path} has no *.safetensors weights (found {found})",
            hint="Save the model with save_pretrained(), which writes safetensors.",
        )
    return None


def find_model(settings: ModelSettings) -> ModelSource:
    """Return the model's files, downloaded if `settings.name` is a hub id.

    Raises:
        ModelNotFoundError: no such directory or repository, or no access to it.
        ModelError: the files are no model that can be loaded.
    """
    if problem := check_model_name(settings):
        raise problem
    if looks_local(settings.name):
        return ModelSource(name=settings.name, path=Path(settings.name).expanduser().resolve())
    return _download(settings)


def _download(settings: ModelSettings) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name, revision = settings.name, settings.revision
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_PATTERNS))
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{name} is gated: this account has no access to it",
            hint=f"Ask for access at https://huggingface.co/{name}, then run: hf auth login",
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"no model at {name!r}: no such directory, and no such repository on the hub",
            hint="Check the name; for a private repository run: hf auth login",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{name} has no revision {revision!r}", hint="Give a branch, tag or commit."
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"no model at {name!r}: no such directory, not in the local cache, and the hub can't be reached",
            hint="Check the path or the network; HF_HUB_OFFLINE=1 keeps the hub from being asked.",
        ) from error
    except HfHubHTTPError as error:
        raise ModelNotFoundError(f"the hub did not hand out {name}: {error}", hint="Try again later.") from error
    if problem := _check_directory(path, None):
        raise problem
    # A snapshot's folder is named by the commit it was resolved to.
    return ModelSource(name=name, path=path, revision=revision, commit=path.name)
