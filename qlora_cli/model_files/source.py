"""Find the model that the user named: a local one, one on the hub, or an adapter or run with its base.

Weights are read from safetensors; pickles and the model's own code only if the settings allow them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from qlora_cli.errors import ModelError, ModelNotFoundError, QloraError
from qlora_cli.events import Noted, Reporter, SilentReporter
from qlora_cli.files import existing_path
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, read_adapter_config
from qlora_cli.model_files.checkpoint import (
    INDEX_SUFFIX,
    read_json,
    read_weight_map,
    weights_entry,
)
from qlora_cli.model_files.given_model import (
    CONFIG,
    HUB_ID,
    base_model_problem,
    check_directory,
    check_files,
    check_model_name,
    check_path,
    has_vocabulary,
    looks_local,
)
from qlora_cli.runs.directory import RunDirectory, enclosing_run
from qlora_cli.runs.record import RunRecord, Values, load_record
from qlora_cli.runs.run_weights import (
    RunWeights,
    weights_of,
    weights_of_part,
)
from qlora_cli.settings.models import ModelSettings

if TYPE_CHECKING:
    from qlora_cli.hub.repository import Repository

HOW_TRAINED = "what the run was based on, and how"
# In addition to the weights. Only in the root: other folders hold the same model in other formats.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
TEMPLATES = "additional_chat_templates/*.jinja"
CODE = "*.py"

_SILENT = SilentReporter()


@dataclass(frozen=True, kw_only=True)
class PendingWeights:
    """Files of a repository that are fetched once it is known that the model can be loaded."""

    repository: "Repository"
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model's files on this disk and where they came from.

    Attributes:
        name: As the user asked for it.
        path: The directory of the base model: config.json and weights.
        revision: The revision of the base that was asked for, by the user, the adapter or the run.
        commit: What that resolved to, for a hub id.
        base_name: The base's own name, a hub id or a path; equals `name` when no adapter was named.
        adapter: The adapter to attach, if the user named an adapter or a run directory.
        run: The run directory that was named, directly or by a part of it.
        record: The record of that run.
        weights: The weights of that run that `adapter` points to.
        tokenizer_path: Where the vocabulary is read from: the adapter if it has one of its own.
        pending: The weights of the base, if they come from the hub; `fetch_weights` downloads them.
    """

    name: str
    path: Path
    revision: str | None = None
    commit: str | None = None
    base_name: str
    adapter: Path | None = None
    run: Path | None = None
    record: RunRecord | None = None
    weights: RunWeights | None = None
    tokenizer_path: Path
    pending: "PendingWeights | None" = None

    @property
    def adapter_step(self) -> int | None:
        """The step that the adapter was saved at, if it belongs to a run and the step is known."""
        return None if self.weights is None else self.weights.step

    @property
    def run_is_done(self) -> bool | None:
        """Whether the run was trained to its end; None if no run was named."""
        return None if self.weights is None else self.weights.is_done

    @property
    def run_quantization(self) -> Values | None:
        """The quantization settings that the run was trained with, if a run was named."""
        return None if self.record is None else self.record.settings_of("quantization", HOW_TRAINED)

    @property
    def run_model(self) -> Values | None:
        """The model settings of the run, its own or those taken over from an earlier run."""
        return None if self.record is None else self.record.settings_of("model", HOW_TRAINED)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """A directory or snapshot with a base model or an adapter."""

    name: str
    path: Path
    revision: str | None = None
    commit: str | None = None
    pending: PendingWeights | None = None

    @property
    def is_adapter(self) -> bool:
        return (self.path / ADAPTER_CONFIG).is_file()


@dataclass(frozen=True, kw_only=True)
class _Base:
    """A base as an adapter, a run or the user names it, and the local `paths` where it may be.

    A base that is known to come from the hub has none: no directory may stand in for it.
    """

    name: str
    revision: str | None = None
    paths: tuple[Path, ...] = ()


def find_model(settings: ModelSettings, reporter: Reporter = _SILENT) -> ModelSource:
    """Return where the model's files are; for one on the hub, download all but the weights of the base.

    For an adapter or a run directory find the base too: at the revision that it names, or `settings.base_model`.

    Raises:
        ModelNotFoundError: no such directory or repository, or no access to it; the same for an adapter's base.
        ModelError: the files are not a model that can be loaded.
        DiskSpaceError: the download does not fit on the disk.
    """
    if problem := check_model_name(settings):
        raise problem
    if not looks_local(settings.name):
        files = _download(settings.name, settings.revision, settings, reporter)
        if not files.is_adapter:
            return _base_source(files, settings)
        return _adapter_source(files, settings, reporter)
    path = Path(settings.name).expanduser().resolve()
    files = _Files(name=settings.name, path=path)
    run = RunDirectory(path) if RunDirectory(path).is_run else enclosing_run(path) if files.is_adapter else None
    if run is not None:
        return _run_source(path, run, settings, reporter)
    return _adapter_source(files, settings, reporter) if files.is_adapter else _base_source(files, settings)


def find_tokenizer(settings: ModelSettings, reporter: Reporter = _SILENT) -> ModelSource:
    """Return where the tokenizer of a model is; for one on the hub, download only the small files.

    A directory needs no weights and no config. For an adapter or a run directory find the base too, since that says
    which tokens end a text.

    Raises:
        ModelNotFoundError: no such directory or repository, or no access to it.
        ModelError: it is an adapter whose base can't be used, or a file.
    """
    name = settings.name
    path = existing_path(name) if looks_local(name) else None
    if path is not None:
        if problem := check_path(path, settings.revision):
            raise problem.for_setting("model.name")
        if RunDirectory(path).is_run or (path / ADAPTER_CONFIG).is_file():
            return find_model(settings, reporter)
        return _base_source(_Files(name=name, path=path.resolve()), settings)
    if problem := check_model_name(settings):
        raise problem.for_setting("model.name")
    files = _download_small(name, settings, reporter)
    return find_model(settings, reporter) if files.is_adapter else _base_source(files, settings)


def fetch_weights(source: ModelSource, reporter: Reporter) -> None:
    """Download those weights of the base that are on the hub and not in the cache.

    Raises:
        ModelNotFoundError: the hub can't be reached, or denies access.
        DiskSpaceError: they do not fit on the disk.
    """
    from qlora_cli.hub.repository import fetch_files

    if source.pending is not None:
        fetch_files(source.pending.repository, source.pending.names, reporter)


def _download(name: str, revision: str | None, settings: ModelSettings, reporter: Reporter) -> _Files:
    """Fetch a model or an adapter: first the small files, then the weights that they name."""
    from qlora_cli.hub.repository import fetch_files, open_repository

    repository = open_repository(name, revision, reporter)
    names = repository.file_names
    root = [file for file in names if "/" not in file]
    if problem := check_files(name, root, settings):
        raise problem
    is_adapter = ADAPTER_CONFIG in names
    small = [file for file in names if _is_small(file, with_code=settings.trust_remote_code and not is_adapter)]
    path = fetch_files(repository, small, reporter)
    # By commit: the branch may change while gigabytes are downloaded.
    pinned = replace(repository, revision=repository.commit)
    if is_adapter:
        weights = [ADAPTER_WEIGHTS if ADAPTER_WEIGHTS in names else ADAPTER_PICKLE]
    else:
        weights = _weight_files(path, root, settings)
    if absent := [file for file in weights if file not in names]:
        raise ModelError(f"the index of {name} names {absent[0]}, which the repository lacks", hint="Tell its author.")
    files = _Files(name=name, path=path, revision=revision, commit=repository.commit)
    if is_adapter:
        fetch_files(pinned, weights, reporter)
        return files
    return replace(files, pending=PendingWeights(repository=pinned, names=tuple(weights)))


def _download_small(name: str, settings: ModelSettings, reporter: Reporter) -> _Files:
    from qlora_cli.hub.repository import fetch_files, open_repository

    repository = open_repository(name, settings.revision, reporter)
    small = [file for file in repository.file_names if _is_small(file, with_code=settings.trust_remote_code)]
    path = fetch_files(repository, small, reporter)
    return _Files(name=name, path=path, revision=settings.revision, commit=repository.commit)


def _is_small(file: str, *, with_code: bool) -> bool:
    if fnmatch(file, TEMPLATES) or (with_code and fnmatch(file, CODE)):
        return True
    return "/" not in file and any(fnmatch(file, pattern) for pattern in SMALL_FILES)


def _weight_files(path: Path, names: Collection[str], settings: ModelSettings) -> list[str]:
    entry = weights_entry(names, allow_pickle=settings.allow_pickle)
    assert entry is not None, "the files were checked"
    return sorted(set(read_weight_map(path / entry).values())) if entry.endswith(INDEX_SUFFIX) else [entry]


def _check_code(base: _Files, settings: ModelSettings) -> None:
    """Refuse code from another repository than the trusted one; transformers would fetch and run it."""
    for file in (CONFIG, "tokenizer_config.json") if settings.trust_remote_code else ():
        classes = read_json(base.path / file).get("auto_map") if (base.path / file).is_file() else None
        for entry in classes.values() if isinstance(classes, Mapping) else ():
            # A tokenizer names two classes, a slow and a fast one.
            for name in entry if isinstance(entry, list) else [entry]:
                if "--" in str(name):
                    repository, _, class_name = name.partition("--")
                    raise ModelError(
                        f"{base.path / file} takes {class_name} from another repository, {repository}",
                        hint=f"Copy that code next to {file} and drop the name before -- in its auto_map.",
                    )


def _base_source(files: _Files, settings: ModelSettings) -> ModelSource:
    if problem := base_model_problem(files.name, settings):
        raise problem
    _check_code(files, settings)
    return ModelSource(
        name=files.name,
        path=files.path,
        revision=files.revision,
        commit=files.commit,
        base_name=files.name,
        tokenizer_path=files.path,
        pending=files.pending,
    )


def _adapter_source(
    adapter: _Files,
    settings: ModelSettings,
    reporter: Reporter,
    record: RunRecord | None = None,
) -> ModelSource:
    """Return the source of `adapter` with its base; `record` is the record of its run, if it has one."""
    _check_code(adapter, settings)
    read_adapter_config(adapter.path)  # checked for a run too, though its record names the base
    asked = settings.base_model
    named = _base_of_adapter(adapter.path) if record is None else _base_run_source(adapter.path, record)
    base = _find_base(named if asked is None else _Base(name=asked, paths=(Path(asked),)), adapter, settings, reporter)
    return ModelSource(
        name=adapter.name,
        path=base.path,
        revision=base.revision,
        commit=base.commit,
        base_name=base.name,
        adapter=adapter.path,
        record=record,
        tokenizer_path=adapter.path if has_vocabulary(adapter.path) else base.path,
        pending=base.pending,
    )


def _run_source(path: Path, run: RunDirectory, settings: ModelSettings, reporter: Reporter) -> ModelSource:
    """Return the source for `path`: a run, with the weights that represent it, or a part of one."""
    record = load_record(run.path)
    is_part = path != run.path
    weights = weights_of_part(path, run, record) if is_part else weights_of(run, record)
    if problem := check_directory(weights.path, settings):
        raise problem
    for damage in weights.damaged:
        reporter.report(Noted(level="warning", message=f"ignored in {run.path}: {damage}"))
    reporter.report(Noted(message=f"{settings.name}: {weights.sentence}"))
    source = _adapter_source(_Files(name=settings.name, path=weights.path), settings, reporter, record)
    return replace(source, run=run.path, weights=weights)


def _base_run_source(adapter: Path, record: RunRecord) -> _Base:
    for section in ("quantization", "model"):  # which a run must have, too
        record.settings_of(section, HOW_TRAINED)
    base = record.base()
    if base.commit is not None:
        return _Base(name=base.name, revision=base.commit)
    own = read_adapter_config(adapter).base_model_name_or_path
    paths = (*base.candidate_paths, *((Path(own),) if own else ()))  # the user may have edited it since
    return _Base(name=str(base.candidate_paths[0]), paths=paths)


def _base_of_adapter(adapter: Path) -> _Base:
    config = read_adapter_config(adapter)
    name, revision = config.base_model_name_or_path, config.revision
    if not name:
        raise ModelError(
            f"the adapter in {adapter} does not name its base model",
            hint=f"Set base_model_name_or_path in its {ADAPTER_CONFIG}.",
        )
    is_hub = bool(revision) and HUB_ID.fullmatch(name) is not None
    return _Base(name=name, revision=revision or None, paths=() if is_hub else (Path(name), adapter / name))


def _find_base(named: _Base, adapter: _Files, settings: ModelSettings, reporter: Reporter) -> _Files:
    candidates = [existing_path(path) for path in named.paths]
    path = next((path.resolve() for path in candidates if path is not None and path.is_dir()), None)
    if path is None and (named.name.startswith((".", "~")) or not HUB_ID.fullmatch(named.name)):
        raise _missing_base(named, adapter)
    try:
        if path is None:
            base = _download(named.name, named.revision, settings, reporter)
        else:
            if path != named.paths[0].absolute().resolve() or not Path(named.name).is_absolute():
                reporter.report(Noted(message=f"the base {named.name} is taken from the directory {path}"))
            base = _Files(name=str(path), path=path)
            if problem := check_directory(path, settings):
                raise problem
    except QloraError as error:
        raise type(error)(f"the base of the adapter {adapter.name}: {error}", hint=error.hint) from error
    if base.is_adapter:
        raise ModelError(
            f"the base of the adapter {adapter.name} is {base.name}, an adapter itself",
            hint="Merge that one into its own base first, and name the result as the base.",
        )
    _check_code(base, settings)
    return base


def _missing_base(named: _Base, adapter: _Files) -> ModelNotFoundError:
    paths = [str(path if str(path).startswith("~") else path.absolute()) for path in named.paths]
    searched = " and ".join(dict.fromkeys(paths))
    return ModelNotFoundError(
        f"the base of the adapter {adapter.name} is {named.name}, which does not exist (looked for {searched})",
        hint="Put it there, or say where it is: --base-model BASE.",
    )
