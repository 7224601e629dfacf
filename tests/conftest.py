"""What tests share: the bundled tiny model, small data sets, and the command line as a user runs it."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from qlora_cli.events import Event
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved, Sources, resolve
from tests.support.processes.forks import output_of, prepare_environment
from tests.support.processes.plain_python import PlainPython, plain_python

OBJECTS_PER_COLLECTION = 20_000  # new ones; by Python's own 700, the searches are a twentieth of the time
ASSETS = Path(__file__).parent.parent / "qlora_cli" / "demo" / "assets"

# Nothing in a test leaves the machine: without this, a misspelt path would be asked for on the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# How fast this machine is decides no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value


RunQlora = Callable[..., Finished]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the choice of `scripts/test fast`."""
    parser.addoption("--fast", action="store_true", help="one case of each test, and none that is marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out all but the first case of each test, and of integration tests all but those marked `fast`."""
    if not config.getoption("fast"):
        return
    chosen: dict[str, pytest.Item] = {}
    for item in items:
        is_left_out = item.get_closest_marker("slow") is not None
        if "integration" in item.path.parts:
            is_left_out = item.get_closest_marker("fast") is None
        if not is_left_out:
            chosen.setdefault(item.nodeid.partition("[")[0], item)
    first = set(chosen.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in first])
    items[:] = chosen.values()


def pytest_collection_finish() -> None:
    """Take what is imported and collected out of every later search for cycles: each training asks for one."""
    _freeze()
    gc.set_threshold(OBJECTS_PER_COLLECTION)


def _freeze() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _frozen_imports() -> None:
    """Take what earlier modules have imported when they needed it out of that search, too."""
    _freeze()


@pytest.fixture(scope="session", autouse=True)
def _private_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Read by `datasets` and `huggingface_hub` when they are first imported, here and in subprocesses.
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf-home"))
    os.environ["QLORA_CACHE"] = str(tmp_path_factory.mktemp("answers"))
    prepare_environment()


@pytest.fixture(scope="module", autouse=True)
def _few_cached_tokens(_private_caches: None) -> Iterator[None]:
    """Delete the cached tokens of a module after it: the more there are, the longer each new one takes."""
    yield
    shutil.rmtree(Path(os.environ["QLORA_CACHE"]) / "data", ignore_errors=True)


@pytest.fixture(scope="session")
def run_qlora() -> RunQlora:
    """Run `qlora` with arguments in a process of its own and wait for it.

    It is forked from a process that has imported everything, unless a variable in `env` is read by an import, or
    imports are what is tested, in which case `is_forked` is false.
    """

    def run(
        *arguments: str | Path,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        is_forked: bool = True,
        descriptors: Mapping[int, int] | None = None,
    ) -> Finished:
        environment = {**os.environ, **(env or {})}
        command = [*map(str, arguments)]
        return Finished(*output_of(command, environment, cwd, is_forked=is_forked, descriptors=descriptors))

    return run


@pytest.fixture(scope="session", name="plain_python")
def _plain_python() -> Iterator[PlainPython]:
    """Run a script with plain PyTorch and transformers, in a process that does not know this package."""
    with plain_python() as run:
        yield run


@pytest.fixture(scope="session")
def base_model() -> Path:
    """The bundled trained model: Llama-shaped, 3.5 million parameters."""
    return ASSETS / "base"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve rows of the bundled data, as messages."""
    path = tmp_path / "rows.jsonl"
    lines = (ASSETS / "train.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, values: Sequence[dict[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def train_settings(model: Path, dataset: Path, output: Path, **flags: object) -> Resolved[TrainSettings]:
    """Return settings in fp32 for exact comparisons; `section__key=value` sets any other.

    A checkpoint is saved after the last step only: one after each of three takes a fifth of a run.
    """
    values: dict[str, object] = {
        "model.name": str(model),
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.dataset": str(dataset),
        "output.directory": str(output),
        "training.micro_batch_size": 2,
        "training.gradient_accumulation_steps": 1,
        "training.max_steps": 3,
        "training.learning_rate": 1e-3,
        "training.save_steps": 100,
        **{name.replace("__", "."): value for name, value in flags.items()},
    }
    return resolve(Sources(flags={path: (path, value) for path, value in values.items()}), TrainSettings)


def short_settings(model: Path, dataset: Path, output: Path, **flags: object) -> Resolved[TrainSettings]:
    """Return `train_settings` of an adapter on two projections a layer, where which ones it is on does not matter.

    Making, checking and saving an adapter takes a third of a run of three steps.
    """
    return train_settings(model, dataset, output, **{"lora__target_modules": ["q_proj", "down_proj"], **flags})


class Recorder:
    """A reporter that records events."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def report(self, event: Event) -> None:
        self.events.append(event)
