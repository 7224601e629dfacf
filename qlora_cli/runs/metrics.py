"""The events of a run as JSON lines, written and read by a union of their types, each tagged with its class."""

import functools
import json
import math
import operator
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, get_args

from pydantic import Discriminator, Tag, TypeAdapter, ValidationError

from qlora_cli.events import (
    EvalDone,
    Event,
    Rehearsed,
    StepDone,
    StepSkipped,
    TrainingEnded,
    TrainingResumed,
    TrainingStarted,
    WorkAdvanced,
)
from qlora_cli.files import as_json
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.writing import append_line, end_line


def _name_of(kind: type[Event]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower()


_KINDS = [kind for kind in get_args(Event) if kind is not WorkAdvanced]  # which is none of a run
EVENT_NAMES: dict[type[Event], str] = {kind: _name_of(kind) for kind in _KINDS}
_KNOWN = frozenset(EVENT_NAMES.values())


def _tag_of(value: Any) -> str:
    name: str = value["event"] if isinstance(value, dict) else EVENT_NAMES[type(value)]
    return name


_TAGGED: Any = functools.reduce(operator.or_, (Annotated[kind, Tag(name)] for kind, name in EVENT_NAMES.items()))
_EVENTS: TypeAdapter[Event] = TypeAdapter(Annotated[_TAGGED, Discriminator(_tag_of)])

# Defaults for figures that a line lacks, or that are not numbers: the rest of the line still counts.
NAN = math.nan
GAPS: Mapping[type[Event], Mapping[str, object]] = {
    StepDone: {
        **dict.fromkeys(("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second", "elapsed_seconds"), NAN),
        **dict.fromkeys(("num_steps", "num_tokens"), 0),
        "memory": {"host_bytes": 0},
        "rewards": None,
    },
    EvalDone: {"seconds": NAN, "is_best": False, "rewards": None},
    Rehearsed: {"seconds": NAN, "device_allocated_bytes": None, "device_reserved_bytes": None},
    StepSkipped: {"reason": "", "rows": ()},
    TrainingStarted: {"num_steps": 0, "output": ""},
    TrainingResumed: {"num_steps": 0, "checkpoint": ""},
    TrainingEnded: {"num_steps": 0, "interrupted_by": None},
}
_GAPS_OF = {EVENT_NAMES[kind]: gaps for kind, gaps in GAPS.items()}


def event_line(event: Event, time: datetime) -> str:
    """Return an event as a line, without a line break."""
    content = {"event": EVENT_NAMES[type(event)], "time": time.isoformat(timespec="milliseconds")}
    return json.dumps({**content, **as_json(_EVENTS.dump_python(event))})


def read_event(content: Mapping[str, Any]) -> Event | None:
    """Return the event of a parsed line; None if this version does not know its kind.

    Raises:
        ValueError: it lacks a required value.
        KeyError: it has no kind.
    """
    if content["event"] not in _KNOWN:
        return None
    try:
        return _EVENTS.validate_python(content)
    except ValidationError as error:
        return _EVENTS.validate_python(_with_gaps(content, error))


def _with_gaps(content: Mapping[str, Any], error: ValidationError) -> dict[str, Any]:
    """Return the content of a line with defaults for invalid figures, and without text that UTF-8 can't encode."""
    repaired, gaps = dict(content), _GAPS_OF.get(content["event"], {})
    for problem in error.errors(include_url=False):
        key = str(problem["loc"][1]) if len(problem["loc"]) > 1 else ""
        if problem["type"] == "string_unicode":
            repaired[key] = _in_unicode(repaired[key])
        elif key in gaps and (key != "memory" or repaired.get(key) is None):
            repaired[key] = gaps[key]
    return repaired


def _in_unicode(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return [_in_unicode(part) for part in value] if isinstance(value, list) else value


class MetricsWriter:
    """A reporter that appends each event to the metrics file as a line."""

    def __init__(self, directory: RunDirectory) -> None:
        self._file = directory.metrics_file

    def report(self, event: Event) -> None:
        """Append `event`; the file is opened and closed each time, so that the line survives the process."""
        append_line(self._file, event_line(event, datetime.now(UTC)))

    def end_partial_line(self) -> None:
        """Terminate a last line that a killed process left unfinished."""
        end_line(self._file)
