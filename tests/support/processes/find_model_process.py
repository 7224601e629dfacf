"""Find a model as every command does, in a process of its own: the hub's client reads its environment when imported.

    python -m tests.support.processes.find_model_process '{"name": "owner/tiny", "revision": "main"}' [WAIT ...]

With waits, the seconds between two attempts, all files of the repository are fetched.
Prints one JSON object per line: the events, then the source or the error.
"""

import dataclasses
import json
import sys

from qlora_cli.errors import QloraError
from qlora_cli.events import Event
from qlora_cli.hub.http_failures import Retry
from qlora_cli.hub.repository import fetch_files, open_repository
from qlora_cli.model_files.source import fetch_weights, find_model
from qlora_cli.settings.models import ModelSettings


class Printer:
    """Prints each event."""

    def report(self, event: Event) -> None:
        """Print `event`."""
        print(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}, default=str), flush=True)


def main() -> None:
    """Find the model that the arguments name."""
    if "torch" in sys.modules:  # in a fork, where importing it fails from here on
        sys.modules["torch"] = None  # type: ignore[assignment]
    settings = ModelSettings.model_validate_json(sys.argv[1])
    waits = tuple(float(argument) for argument in sys.argv[2:])
    try:
        if waits:
            repository = open_repository(settings.name, settings.revision, Printer(), Retry(waits_seconds=waits))
            path = fetch_files(repository, repository.file_names, Printer(), Retry(waits_seconds=waits))
            result: dict[str, object] = {"path": path}
        else:
            source = find_model(settings, Printer())
            fetch_weights(source, Printer())
            result = dataclasses.asdict(dataclasses.replace(source, pending=None))
    except QloraError as error:
        result = {"error": type(error).__name__, "message": str(error), "hint": error.hint}
    assert sys.modules.get("torch") is None, "names are checked, and files found, before torch is imported"
    print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
