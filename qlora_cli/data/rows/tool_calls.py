"""Tools, and calls of them, as data sets write them, read into the form that servers give to chat templates."""

from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import RowError, is_blank, json_type_of, read_json, read_json_values

# What the arguments of a call are called by OpenAI, by Llama 3, by others, and by Anthropic.
ARGUMENTS = ("arguments", "parameters", "args", "input")
SCHEMAS = ("parameters", "input_schema")  # of a tool's arguments
NO_JSON = ("", "{}", "[]", "null")  # what text of JSON is that says nothing
# What calls and their functions have that templates know, or that tells calls apart.
CALL_KEYS = {"type", "id", "index", "call_id", "tool_call_id", "function"}
FUNCTION_KEYS = {"name", "arguments"}


def read_tools(value: object, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row as servers send them; None if there are none.

    A list of definitions, or JSON text of them; a definition may be bare, without what says that it is a function.

    Raises:
        RowError: `value` is something else, or a tool has no name.
    """
    if isinstance(value, str):
        value = _flat(read_json_values(value, where)) if value.strip() else None
    if not value or (isinstance(value, Mapping) and _says_nothing(value)):
        return None
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of tools, found {json_type_of(value)}")
    tools = [_read_tool(tool, f"{where} {place}") for place, tool in enumerate(value) if not _says_nothing(tool)]
    return tools or None


def read_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Return calls with arguments as objects: OpenAI writes them as JSON text, templates write it again.

    A list, one call, or JSON text of either, in which calls may also stand one after another.

    Raises:
        RowError: `value` is something else, or a call names no function.
    """
    if isinstance(value, str):
        value = _flat(read_json_values(value, where)) if value.strip() else []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list, found {json_type_of(value)}")
    return [_read_call(call, where) for call in value if not _says_nothing(call)]


def unknown_keys(calls: list[dict[str, Any]]) -> set[str]:
    """Return the keys of calls, and of their functions, that no list knows, as `tool_calls.KEY`."""
    found = {f"tool_calls.{key}" for call in calls for key in call.keys() - CALL_KEYS if not is_blank(call[key])}
    functions = [call["function"] for call in calls]
    return found | {
        f"tool_calls.function.{key}"
        for function in functions
        for key in function.keys() - FUNCTION_KEYS
        if not is_blank(function[key])
    }


def _says_nothing(value: object) -> bool:
    """Whether there is no call, or no tool, as in objects that columns make of a null."""
    if not isinstance(value, Mapping):
        return _is_blank_json(value)
    said = {key: part for key, part in value.items() if key not in ("id", "index", "function")}
    function = value.get("function")
    return all(_is_blank_json(part) for key, part in said.items() if (key, part) != ("type", "function")) and (
        _says_nothing(function) if isinstance(function, Mapping) else _is_blank_json(function)
    )


def _is_blank_json(value: object) -> bool:
    return value.strip() in NO_JSON if isinstance(value, str) else is_blank(value)


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
    outer = {} if is_bare else {key: value for key, value in found.items() if key != "function"}
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where} must hold functions with a name")
    if outer.pop("name", name) != name:
        raise RowError(f"{where} has a call of {found['name']!r} with a function {name!r}: which is called?")
    function = _with_arguments(function, outer, where)
    if not is_bare:
        return {key: function if key == "function" else outer[key] for key in found if key in {*outer, "function"}}
    outer = {"id": function.pop("id")} if "id" in function else {}
    function.pop("type", None)
    return {**outer, "type": "function", "function": function}


def _with_arguments(function: dict[str, Any], outer: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a function with its arguments, by whichever name they have, taken out of the call around it too.

    They stay in their place, for templates that write a call as it is.

    Raises:
        RowError: they are no JSON, or there under two names with values that differ.
    """
    given = {(key, True): function[key] for key in ARGUMENTS if key in function}
    given |= {(key, False): outer.pop(key) for key in ARGUMENTS if key in outer}
    read = {
        (key, inside): _read_arguments(value, f"{where}[].{'function.' if inside else ''}{key}")
        for (key, inside), value in given.items()
    }
    said = {name: value for name, value in read.items() if value not in ("", {}, [], None)}
    (key, inside), arguments = next(iter((said or read).items()), (("arguments", False), {}))
    for (other_key, _), other in said.items():
        if other != arguments:
            raise RowError(f"{where} has a call with arguments in both {key!r} and {other_key!r}, which differ")
    kept = {name: value for name, value in function.items() if name not in ARGUMENTS or (inside and name == key)}
    found = {"arguments" if name == key else name: value for name, value in kept.items()}
    return {**found, "arguments": {} if arguments is None else arguments}


def _read_arguments(arguments: object, where: str) -> Any:
    if not isinstance(arguments, str):
        return arguments
    return read_json(arguments, where) if arguments.strip() else {}


def _without_nulls(value: object) -> dict[str, Any]:
    """Return an object without its nulls, which is what a key that is not there is read as from columns."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, Mapping) else {}
