"""Read tools and tool calls, in the forms that data sets use, into the form that servers pass to chat templates."""

from collections.abc import Mapping
from typing import Any

from qlora_cli.data.rows.examples import RowError, is_blank, json_type_of, parse_json, parse_json_values

# The key of a call's arguments: OpenAI's, Llama 3's, others', Anthropic's.
ARGUMENTS = ("arguments", "parameters", "args", "input")
SCHEMAS = ("parameters", "input_schema")  # of a tool's arguments
BLANK_JSON = ("", "{}", "[]", "null")
# Keys of calls and their functions that templates know, or that only identify a call.
CALL_KEYS = {"type", "id", "index", "call_id", "tool_call_id", "function"}
FUNCTION_KEYS = {"name", "arguments"}


def read_tools(value: object, where: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row in the form that servers use; None if there are none.

    `value` is a list of definitions, or JSON text of one; a definition may lack the wrapper `{"type": "function"}`.

    Raises:
        RowError: `value` is anything else, or a tool has no name.
    """
    if isinstance(value, str):
        value = _flatten(parse_json_values(value, where)) if value.strip() else None
    if not value or (isinstance(value, Mapping) and _is_blank_call(value)):
        return None
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list of tools, found {json_type_of(value)}")
    tools = [_read_tool(tool, f"{where}[{index}]") for index, tool in enumerate(value) if not _is_blank_call(tool)]
    return tools or None


def read_calls(value: object, where: str) -> list[dict[str, Any]]:
    """Return calls with their arguments as objects; OpenAI writes arguments as JSON text, templates serialize objects.

    `value` is a list of calls, a single call, or JSON text of either; in text, calls may also follow one another.

    Raises:
        RowError: `value` is anything else, or a call names no function.
    """
    if isinstance(value, str):
        value = _flatten(parse_json_values(value, where)) if value.strip() else []
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise RowError(f"{where} must be a list, found {json_type_of(value)}")
    return [_read_call(call, where) for call in value if not _is_blank_call(call)]


def unknown_keys(calls: list[dict[str, Any]]) -> set[str]:
    """Return the unknown keys of calls and of their functions, as `tool_calls.KEY` or `tool_calls.function.KEY`."""
    keys = {f"tool_calls.{key}" for call in calls for key in call.keys() - CALL_KEYS if not is_blank(call[key])}
    functions = [call["function"] for call in calls]
    return keys | {
        f"tool_calls.function.{key}"
        for function in functions
        for key in function.keys() - FUNCTION_KEYS
        if not is_blank(function[key])
    }


def _is_blank_call(value: object) -> bool:
    """Return whether a call or a tool is blank, as the objects are that columnar files hold in place of a null."""
    if not isinstance(value, Mapping):
        return _is_blank_json(value)
    fields = {key: part for key, part in value.items() if key not in ("id", "index", "function")}
    function = value.get("function")
    return all(_is_blank_json(part) for key, part in fields.items() if (key, part) != ("type", "function")) and (
        _is_blank_call(function) if isinstance(function, Mapping) else _is_blank_json(function)
    )


def _is_blank_json(value: object) -> bool:
    return value.strip() in BLANK_JSON if isinstance(value, str) else is_blank(value)


def _flatten(values: list[Any]) -> list[Any]:
    return [part for value in values for part in (value if isinstance(value, list) else [value])]


def _read_tool(tool: object, where: str) -> dict[str, Any]:
    if isinstance(tool, str):
        tool = parse_json(tool, where)
    definition = _without_nulls(tool)
    if isinstance(definition.get("function"), Mapping):
        return {"type": "function", **definition}
    function = {key: value for key, value in definition.items() if (key, value) != ("type", "function")}
    if not isinstance(function.get("name"), str):
        raise RowError(f"{where} must be a function with a name")
    schema = next((key for key in SCHEMAS if key in function), None)
    if schema is not None:
        function["parameters"] = function.pop(schema)
    return {"type": "function", "function": function}


def _read_call(value: object, where: str) -> dict[str, Any]:
    call = _without_nulls(value)
    is_bare = not isinstance(call.get("function"), Mapping)
    function = call if is_bare else _without_nulls(call["function"])
    outer = {} if is_bare else {key: value for key, value in call.items() if key != "function"}
    name = function.get("name")
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{where} must hold functions with a name")
    if outer.pop("name", name) != name:
        raise RowError(f"{where} has a call of {call['name']!r} with a function {name!r}: which is called?")
    function = _with_arguments(function, outer, where)
    if not is_bare:
        return {key: function if key == "function" else outer[key] for key in call if key in {*outer, "function"}}
    outer = {"id": function.pop("id")} if "id" in function else {}
    function.pop("type", None)
    return {**outer, "type": "function", "function": function}


def _with_arguments(function: dict[str, Any], outer: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a function with its arguments under `arguments`; they are removed from `outer`, the call around it.

    The order of its keys is preserved, for templates that write a call as it is.

    Raises:
        RowError: the arguments are not JSON, or are present under two keys with different values.
    """
    written = {(key, True): function[key] for key in ARGUMENTS if key in function}
    written |= {(key, False): outer.pop(key) for key in ARGUMENTS if key in outer}
    read = {
        (key, is_inner): _read_arguments(value, f"{where}[].{'function.' if is_inner else ''}{key}")
        for (key, is_inner), value in written.items()
    }
    non_empty = {source: value for source, value in read.items() if value not in ("", {}, [], None)}
    (key, is_inner), arguments = next(iter((non_empty or read).items()), (("arguments", False), {}))
    for (other_key, _), other in non_empty.items():
        if other != arguments:
            raise RowError(f"{where} has a call with arguments in both {key!r} and {other_key!r}, which differ")
    without_aliases = {
        name: value for name, value in function.items() if name not in ARGUMENTS or (is_inner and name == key)
    }
    renamed = {"arguments" if name == key else name: value for name, value in without_aliases.items()}
    return {**renamed, "arguments": {} if arguments is None else arguments}


def _read_arguments(arguments: object, where: str) -> Any:
    if not isinstance(arguments, str):
        return arguments
    return parse_json(arguments, where) if arguments.strip() else {}


def _without_nulls(value: object) -> dict[str, Any]:
    """Return an object without its nulls, which columnar files hold for missing keys; empty if it is no object."""
    return {key: part for key, part in value.items() if part is not None} if isinstance(value, Mapping) else {}
