"""Print results on stdout as one JSON object. Everything else goes to stderr."""

import dataclasses
import json
from typing import Any


def print_json(result: Any) -> None:
    """Print a frozen result, or a mapping, as one JSON object on stdout."""
    from qlora_cli.files import as_json  # and all that writes files: not for the help

    content = (
        dataclasses.asdict(result) if dataclasses.is_dataclass(result) and not isinstance(result, type) else result
    )
    print(json.dumps(as_json(content), indent=2), flush=True)  # a full disk must show here, not at exit
