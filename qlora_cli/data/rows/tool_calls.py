"""Tools, and calls of them, as data sets write them, read into the form that servers give to chat templates."""

from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import RowError, kind_of, read_json, read_json_values

# What the arguments of a call are called by OpenAI, by Llama 3, by others, and by Anthropic.
ARGUMENTS = ("arguments", "parameters", "args", "input")
SCHEMAS = ("parameters", "input_schema")  # of a tool's arguments


def read_tools(value: object, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row as servers send them; None if there are none.

    A list of definitions, or JSON text of them; a definition may be bare, without what says that it is a function.

    Raises:
        RowError: `value` is something else, or a tool has no name.
    """
    if isinstance(value, str):
        value = _flat(read_json_values(value, where)) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of tools, found {kind_of(value)}")
    return [_read_tool(tool, f"{where} {place}") for place, tool in enumerate(value)]


def read_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Return calls with arguments as objects: OpenAI writes them as JSON text, templates write it again.

    A list, one call, or JSON text of either, in which calls may also stand one after another.

    Raises:
        RowError: `value` is something else, or a call names no function.
    """
    if isinstance(value, str):
        value = _flat(read_json_values(value, where)) if value.strip() else []
    if isinstance(value, Mapping):
        value = [value] if any(part is not None for part in value.values()) else []
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list, found {kind_of(value)}")
    return [_read_call(call, where) for call in value]


def _flat(values: list[Any]) -> list[Any]:
    return [part for value in values for part in (value if isinstance(value, list) else [value])]


def _read_tool(tool: object, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = read_json(tool, where)
    found = _without_nulls(tool)
    if isinstance(found.get("function"), Mapping):
        return {"type": "function", **found}
    function = {key: value for key, value in found.items() if (key, value) != ("type", "function")}
    if not isinstance(function.get("name"), str):
        raise RowError(f"{where} must be a function with a name")
    schema = next((key for key in SCHEMAS if key in function), None)
    if schema is not None:
        function["parameters"] = function.pop(schema)
    return {"type": "function", "function": function}


def _read_call(call: object, where: str) -> dict[str, Any]:
    found = _without_nulls(call)
    is_bare = not isinstance(found.get("function"), Mapping)
    function = found if is_bare else _without_nulls(found["function"])
    if not isinstance(function.get("name"), str):
        raise RowError(f"{where} must hold functions with a name")
    key = next((key for key in ARGUMENTS if key in function), "arguments")
    arguments = _read_arguments(function.get(key, {}), f"{where}[].function.{key}")
    function = {**function, key: arguments}  # in its place, for templates that write a call as it is
    function = {"arguments" if name == key else name: part for name, part in function.items()}
    if not is_bare:
        return {**found, "function": function}
    outer = {"id": function.pop("id")} if "id" in function else {}
    function.pop("type", None)
    return {**outer, "type": "function", "function": function}


def _read_arguments(arguments: object, where: str) -> Any:
    if not isinstance(arguments, str):
        return arguments
    return read_json(arguments, where) if arguments.strip() else {}


def _without_nulls(value: object) -> dict[str, Any]:
    """Return an object without its nulls, which is what a key that is not there is read as from columns."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, Mapping) else {}
