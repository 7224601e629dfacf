"""Find the model that was asked for: a local one, one on the hub, or an adapter or run with its base.

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
from qlora_cli.runs.directory import RunDirectory, run_around
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
# Besides the weights. In the root only: other folders hold the same model in other formats.
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
TEMPLATES = "additional_chat_templates/*.jinja"
CODE = "*.py"

_SILENT = SilentReporter()


@dataclass(frozen=True, kw_only=True)
class PendingWeights:
    """Files of a repository that are fetched once it is settled that the model can be loaded."""

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
        adapter: The adapter to attach, when the user named an adapter or a run directory.
        run: The run directory that was named, itself or by a part of it.
        record: What that run recorded of itself.
        weights: Which of its weights `adapter` is.
        tokenizer_path: Where the vocabulary is read from: the adapter if it has one of its own.
        pending: The weights of the base, if they come from the hub: `fetch_weights` brings them.
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
        """The step of the run that the adapter is of, if it is of a run, and that is known."""
        return None if self.weights is None else self.weights.step

    @property
    def run_is_done(self) -> bool | None:
        """Whether the run was trained to its end; None if none was named."""
        return None if self.weights is None else self.weights.is_done

    @property
    def run_quantization(self) -> Values | None:
        """The quantization settings that the run was trained with, if one was named."""
        return None if self.record is None else self.record.settings_of("quantization", HOW_TRAINED)

    @property
    def run_model(self) -> Values | None:
        """Its model settings, as they were asked for or taken over from the run before it."""
        return None if self.record is None else self.record.settings_of("model", HOW_TRAINED)


@dataclass(frozen=True, kw_only=True)
class _Files:
    """One directory or snapshot that was found: a base model, or an adapter."""

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
    """A base as an adapter, a run or the user names it, and the `places` on this disk that it may be at.

    A base that is known to come from the hub has none: no directory may take its place.
    """

    name: str
    revision: str | None = None
    places: tuple[Path, ...] = ()


def find_model(settings: ModelSettings, reporter: Reporter = _SILENT) -> ModelSource:
    """Return where the model's files are; of one on the hub all but the base's weights are downloaded.

    Of an adapter or a run directory the base is found too: at the revision that it names, or `settings.base_model`.

    Raises:
        ModelNotFoundError: no such directory or repository, or no access to it; also of an adapter's base.
        ModelError: the files are no model that can be loaded.
        DiskSpaceError: the download does not fit on the disk.
    """
    if problem := check_model_name(settings):
        raise problem
    if not looks_local(settings.name):
        found = _download(settings.name, settings.revision, settings, reporter)
        if not found.is_adapter:
            return _plain(found, settings)
        return _attached(found, settings, reporter)
    path = Path(settings.name).expanduser().resolve()
    found = _Files(name=settings.name, path=path)
    run = RunDirectory(path) if RunDirectory(path).is_run else run_around(path) if found.is_adapter else None
    if run is not None:
        return _of_run(path, run, settings, reporter)
    return _attached(found, settings, reporter) if found.is_adapter else _plain(found, settings)


def find_tokenizer(settings: ModelSettings, reporter: Reporter = _SILENT) -> ModelSource:
    """Return where the tokenizer of a model is; of one on the hub only the small files are downloaded.

    A directory needs no weights and no config. Of an adapter or a run directory the base is found too, since it says
    what ends a text.

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
        return _plain(_Files(name=name, path=path.resolve()), settings)
    if problem := check_model_name(settings):
        raise problem.for_setting("model.name")
    found = _download_small(name, settings, reporter)
    return find_model(settings, reporter) if found.is_adapter else _plain(found, settings)


def fetch_weights(source: ModelSource, reporter: Reporter) -> None:
    """Download the weights of the base as far as they are on the hub and not in the cache.

    Raises:
        ModelNotFoundError: the hub can't be reached, or does not hand them out.
        DiskSpaceError: they do not fit on the disk.
    """
    from qlora_cli.hub.repository import fetch_files

    if source.pending is not None:
        fetch_files(source.pending.repository, source.pending.names, reporter)


def _download(name: str, revision: str | None, settings: ModelSettings, reporter: Reporter) -> _Files:
    """Fetch a model or an adapter: first the small files, then the weights that they speak of."""
    from qlora_cli.hub.repository import fetch_files, open_repository

    repository = open_repository(name, revision, reporter)
    names = repository.file_names
    root = [file for file in names if "/" not in file]
    if problem := check_files(name, root, settings):
        raise problem
    is_adapter = ADAPTER_CONFIG in names
    small = [file for file in names if _is_small(file, with_code=settings.trust_remote_code and not is_adapter)]
    path = fetch_files(repository, small, reporter)
    # By commit: the branch may move on while gigabytes arrive.
    pinned = replace(repository, revision=repository.commit)
    if is_adapter:
        weights = [ADAPTER_WEIGHTS if ADAPTER_WEIGHTS in names else ADAPTER_PICKLE]
    else:
        weights = _weight_files(path, root, settings)
    if absent := [file for file in weights if file not in names]:
        raise ModelError(f"the index of {name} names {absent[0]}, which the repository lacks", hint="Tell its author.")
    found = _Files(name=name, path=path, revision=revision, commit=repository.commit)
    if is_adapter:
        fetch_files(pinned, weights, reporter)
        return found
    return replace(found, pending=PendingWeights(repository=pinned, names=tuple(weights)))


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
    """Refuse code of another repository than the one that was trusted; transformers would fetch and run it."""
    for file in (CONFIG, "tokenizer_config.json") if settings.trust_remote_code else ():
        classes = read_json(base.path / file).get("auto_map") if (base.path / file).is_file() else None
        for place in classes.values() if isinstance(classes, Mapping) else ():
            # A tokenizer names two classes, a slow and a fast one.
            for name in place if isinstance(place, list) else [place]:
                if "--" in str(name):
                    repository, _, class_name = name.partition("--")
                    raise ModelError(
                        f"{base.path / file} takes {class_name} from another repository, {repository}",
                        hint=f"Copy that code next to {file} and drop the name before -- in its auto_map.",
                    )


def _plain(found: _Files, settings: ModelSettings) -> ModelSource:
    if problem := base_model_problem(found.name, settings):
        raise problem
    _check_code(found, settings)
    return ModelSource(
        name=found.name,
        path=found.path,
        revision=found.revision,
        commit=found.commit,
        base_name=found.name,
        tokenizer_path=found.path,
        pending=found.pending,
    )


def _attached(
    adapter: _Files,
    settings: ModelSettings,
    reporter: Reporter,
    record: RunRecord | None = None,
) -> ModelSource:
    """Find the base of `adapter`; `record` is that of the run that it is of, if it is of one."""
    _check_code(adapter, settings)
    read_adapter_config(adapter.path)  # of a run too, which names the base itself
    asked = settings.base_model
    named = _base_of_adapter(adapter.path) if record is None else _base_of_run(adapter.path, record)
    base = _find_base(
        named if asked is None else _Base(name=asked, places=(Path(asked),)), adapter, settings, reporter
    )
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


def _of_run(path: Path, run: RunDirectory, settings: ModelSettings, reporter: Reporter) -> ModelSource:
    """Return what `path` is: a run, of which the weights that count are taken, or a part of one."""
    record = load_record(run.path)
    is_part = path != run.path
    weights = weights_of_part(path, run, record) if is_part else weights_of(run, record)
    if problem := check_directory(weights.path, settings):
        raise problem
    for damage in weights.damaged:
        reporter.report(Noted(level="warning", message=f"passed over in {run.path}: {damage}"))
    reporter.report(Noted(message=f"{settings.name}: {weights.sentence}"))
    source = _attached(_Files(name=settings.name, path=weights.path), settings, reporter, record)
    return replace(source, run=run.path, weights=weights)


def _base_of_run(adapter: Path, record: RunRecord) -> _Base:
    for section in ("quantization", "model"):  # what a named run needs besides
        record.settings_of(section, HOW_TRAINED)
    base = record.base()
    if base.commit is not None:
        return _Base(name=base.name, revision=base.commit)
    own = read_adapter_config(adapter).base_model_name_or_path
    places = (*base.places, *((Path(own),) if own else ()))  # which its owner may have set since
    return _Base(name=str(base.places[0]), places=places)


def _base_of_adapter(adapter: Path) -> _Base:
    config = read_adapter_config(adapter)
    name, revision = config.base_model_name_or_path, config.revision
    if not name:
        raise ModelError(
            f"the adapter in {adapter} does not name its base model",
            hint=f"Set base_model_name_or_path in its {ADAPTER_CONFIG}.",
        )
    is_hub = bool(revision) and HUB_ID.fullmatch(name) is not None
    return _Base(name=name, revision=revision or None, places=() if is_hub else (Path(name), adapter / name))


def _find_base(named: _Base, adapter: _Files, settings: ModelSettings, reporter: Reporter) -> _Files:
    found = [existing_path(place) for place in named.places]
    path = next((place.resolve() for place in found if place is not None and place.is_dir()), None)
    if path is None and (named.name.startswith((".", "~")) or not HUB_ID.fullmatch(named.name)):
        raise _no_base(named, adapter)
    try:
        if path is None:
            base = _download(named.name, named.revision, settings, reporter)
        else:
            if path != named.places[0].absolute().resolve() or not Path(named.name).is_absolute():
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


def _no_base(named: _Base, adapter: _Files) -> ModelNotFoundError:
    written = [str(place if str(place).startswith("~") else place.absolute()) for place in named.places]
    looked = " and ".join(dict.fromkeys(written))
    return ModelNotFoundError(
        f"the base of the adapter {adapter.name} is {named.name}, which is not here (looked for {looked})",
        hint="Put it there, or say where it is: --base-model BASE.",
    )
