"""Run lm-eval's tasks on a loaded model, and return its figures under its names."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.exceptions import DatasetsError
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_cli.errors import DataError, OutOfMemoryError, QloraError
from qlora_cli.evaluating.evaluation_checks import YAML_SUFFIXES
from qlora_cli.evaluating.evaluation_result import Kind, TaskResult
from qlora_cli.events import Reporter
from qlora_cli.files import existing_path, read_small
from qlora_cli.hardware.counters import is_out_of_memory
from qlora_cli.settings.models import EvaluationSettings

STDERR = "_stderr"


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks of lm-eval: their names, and the manager that finds them."""

    names: tuple[str, ...]
    manager: Any
    limit: int | None
    batch_size: int

    @torch.no_grad()
    def run(
        self,
        source: Kind,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: torch.dtype,
        title: str,
        reporter: Reporter,
    ) -> tuple[TaskResult, ...]:
        """Return the figures of `model`, computed in `dtype`; `title` names it in progress reports.

        Raises:
            DataError: lm-eval can't load or use the data of a task.
            OutOfMemoryError: a batch does not fit.
        """
        from lm_eval import simple_evaluate

        from qlora_cli.evaluating.lm_eval_model import ReportingLM

        with _quiet():
            wrapped = ReportingLM(
                title=title,
                reporter=reporter,
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=self.batch_size,
                mixed_precision_dtype=None if dtype == torch.float32 else dtype,
            )
            try:
                results = simple_evaluate(
                    model=wrapped,
                    tasks=list(self.names),
                    task_manager=self.manager,
                    limit=self.limit,
                    log_samples=False,
                )
            except (OSError, ValueError, RuntimeError, MemoryError, DatasetsError) as error:
                explained = _explained(error, self.names, self.batch_size)
                raise explained from (None if explained is error else error)
        assert results is not None, "one process"
        return tuple(_figures(source, results))


def find_tasks(request: EvaluationSettings) -> Tasks | None:
    """Return the requested tasks, if any.

    Raises:
        DataError: lm-eval has none of that name, or a file does not name its task.
    """
    if not request.tasks:
        return None
    from lm_eval.tasks import TaskManager

    files = {name: path for name in request.tasks if (path := _file_of(name)) is not None}
    folders = dict.fromkeys(str(path.parent) for path in files.values())
    if request.task_path is not None:
        folders[str(request.task_path)] = None
    with _quiet():
        manager = TaskManager(include_path=list(folders) or None)
    names: dict[str, None] = {}
    for asked in request.tasks:
        matches = manager.match_tasks([_task_of(files[asked]) if asked in files else asked])
        if not matches:
            raise _unknown(asked, manager.all_tasks)
        names |= dict.fromkeys(matches)
    return Tasks(names=tuple(names), manager=manager, limit=request.limit, batch_size=request.batch_size)


def _file_of(name: str) -> Path | None:
    return existing_path(name) if name.endswith(YAML_SUFFIXES) else None


def _task_of(path: Path) -> str:
    """Return the name of the task or group in a YAML file; only lm-eval can read its other values."""
    try:
        root = yaml.compose(read_small(path), Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} can't be read as YAML: {error}", hint="Correct it.") from error
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    values = {key.value: value.value for key, value in entries if isinstance(value, yaml.ScalarNode)}
    name = values.get("group") or values.get("task")
    if not name:
        raise DataError(f"{path} does not name its task", hint="Give it a key task: NAME.")
    return str(name)


def _unknown(name: str, known: Sequence[str]) -> QloraError:
    near = get_close_matches(name, known, n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "See lm-eval ls tasks, or give a YAML file of your own."
    return DataError(f"lm-eval has no task {name}", hint=hint)


def _figures(source: Kind, results: Mapping[str, Any]) -> Iterator[TaskResult]:
    """Yield every figure of every task; for a group also the combined ones."""
    counts = results.get("n-samples", {})
    for task, values in results["results"].items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith(STDERR):
                continue
            stderr = values.get(f"{metric}{STDERR},{filtered}")
            yield TaskResult(
                source=source,
                task=task,
                metric=metric if filtered == "none" else name,
                value=_number(value),
                stderr=_number(stderr),
                num_documents=counts.get(task, {}).get("effective"),
            )


def _number(value: object) -> float | None:
    # lm-eval writes "N/A" if there is no standard error.
    return float(value) if isinstance(value, int | float) else None


def _explained(error: Exception, names: Sequence[str], batch_size: int) -> Exception:
    if is_out_of_memory(error):
        return OutOfMemoryError(
            f"a batch of {batch_size} of {', '.join(names)} does not fit in memory",
            hint=f"Use --batch-size {max(1, batch_size // 2)}.",
        )
    if isinstance(error, RuntimeError | MemoryError):
        return error
    return DataError(
        f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {error}",
        hint="Is the data of the task here, or the network?",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress lm-eval's logs; errors are raised."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
