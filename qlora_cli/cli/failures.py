"""Turn all failures of a command into a message on stderr and an exit code. Nothing else prints errors."""

import errno
import json
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import typer

from qlora_cli.cli.robust_stream import ignoring_lost_terminal, redirect_to_null
from qlora_cli.cli.stderr import COLOURS, print_line, redact
from qlora_cli.errors import Problem, QloraError, SettingsError, UsageError, is_panic

WHERE = "qlora_cli.where"  # the key in the context of a function that says where a setting was given
MAX_TRACEBACK_LINES, FIRST_LINES = 40, 12
PANIC = "Most likely it is the model's tokenizer.json; download the model's files again."
EXTRA_WORDS = re.compile(r"unexpected extra argument(?:\(s\))? \((.+)\)")
SETTINGS_FILE = re.compile(r"\S+\.ya?ml\b")
# What words without a flag were most likely meant to be, by command.
NAMED_BY_FLAGS = {
    **dict.fromkeys(("train", "tune"), "The model is given as --model, and rows as --dataset"),
    **dict.fromkeys(("evaluate", "inspect-data"), "Rows are given as --dataset {first}"),
    "generate": "A prompt is given as --prompt {all}",
    "chat": "The chat asks for what you say; a single prompt is given as qlora generate MODEL --prompt {all}",
}
BUG_REPORT = "This is a bug in qlora; please report it with the lines above."


@contextmanager
def failures_as_messages(arguments: list[str], known: Mapping[str, Any]) -> Iterator[None]:
    """Turn an exception into a message and `typer.Exit`; `arguments` determine whether `--json` was given.

    `known` is the command's context, which records where its settings were given.
    """
    as_json = "--json" in arguments
    try:
        yield
    except QloraError as error:
        _fail(_with_location(error, known.get(WHERE)), as_json=as_json)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer exports no name for it; its message is the help
            print_line(COLOURS.sub("", error.format_message()))
            raise typer.Exit(error.exit_code) from None
        _fail(_explain_usage(error), as_json=as_json)
    except KeyboardInterrupt:
        _fail(_with_code(QloraError("interrupted"), 130), as_json=as_json)
    except BrokenPipeError:  # the reader of our output is gone, as `head` after its lines
        redirect_to_null(sys.stdout)
        raise typer.Exit(141) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # noqa: BLE001 - a bug of ours, reported with its traceback
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            try:
                sys.stdout.flush()
            except OSError:  # the disk of stdout is full, not that of the run
                redirect_to_null(sys.stdout)
            _fail(QloraError(f"the disk is full: {error}", hint="Free disk space and try again."), as_json=as_json)
        with ignoring_lost_terminal(sys.stderr):
            print_line(_traceback_of(error))
        _fail(QloraError(f"{type(error).__name__}: {error}", hint=BUG_REPORT), as_json=as_json)
    except BaseException as error:
        if not is_panic(error):
            raise
        reason = str(error).partition("\n")[0]
        _fail(_with_code(QloraError(f"an input file made a library panic: {reason}", hint=PANIC), 2), as_json=as_json)


def _traceback_of(error: Exception) -> str:
    """Return the traceback of `error`, truncated in the middle to at most `MAX_TRACEBACK_LINES` lines."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    if len(lines) <= MAX_TRACEBACK_LINES:
        return "\n".join(lines)
    last = lines[FIRST_LINES - MAX_TRACEBACK_LINES + 1 :]
    omitted = f"  … {len(lines) - FIRST_LINES - len(last):,} lines left out …"
    return "\n".join([*lines[:FIRST_LINES], omitted, *last])


def problems_of(error: QloraError) -> tuple[Problem, ...]:
    """Return the problems that `error` carries, if any."""
    return error.problems if isinstance(error, SettingsError) else ()


def _fail(error: QloraError, *, as_json: bool) -> None:
    with ignoring_lost_terminal(sys.stderr):  # the exit code stays the same
        _print_error(error)
    if as_json:
        try:
            typer.echo(json.dumps({"error": _as_object(error)}, indent=2))
        except OSError:  # a full disk, or no reader: stderr has the message, and the exit code stays the same
            redirect_to_null(sys.stdout)
    raise typer.Exit(error.exit_code) from None


def _print_error(error: QloraError) -> None:
    problems = problems_of(error)
    if problems:
        for problem in problems:
            print_line(f"error: {problem}")
            if problem.hint:
                print_line(f"  hint: {problem.hint}")
        if len(problems) > 1:
            print_line(f"{len(problems)} problems")
    else:
        print_line(f"error: {error}")
        if error.hint:
            print_line(f"  hint: {error.hint}")


def _with_location(error: QloraError, where_of: Callable[[str], str] | None) -> QloraError:
    """Return an error whose message begins with where the setting that it is about was given."""
    if error.setting is not None and where_of is not None:
        error.message, error.setting = f"{where_of(error.setting)}: {error.message}", None
    return error


def _with_code(error: QloraError, exit_code: int) -> QloraError:
    error.exit_code = exit_code
    return error


def _as_object(error: QloraError) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": redact(str(error)),
        "hint": _redacted(error.hint),
        "exit_code": error.exit_code,
        "problems": [
            {
                "where": redact(problem.where),
                "message": redact(problem.message),
                "hint": _redacted(problem.hint),
            }
            for problem in problems_of(error)
        ],
    }


def _redacted(hint: str | None) -> str | None:
    return None if hint is None else redact(hint)


def _explain_usage(error: typer.TyperException) -> QloraError:
    """Return a usage error of the parser as one of ours, with what was meant if that can be told."""
    context = getattr(error, "ctx", None)
    hint = f"See {context.command_path} --help" if context is not None else None
    message = error.format_message().split(" (Possible options")[0]
    misspelt = getattr(error, "option_name", None)
    if misspelt and context is not None:
        hint = _hint_for_flag(context.command, misspelt) or hint
    if (extra := EXTRA_WORDS.search(message)) and context is not None:
        hint = _hint_for_words(context.command.name, extra[1]) or hint
    usage = UsageError(message[:1].lower() + message[1:].rstrip("."), hint=hint)
    return _with_code(usage, error.exit_code)


def _hint_for_words(command: str, words: str) -> str | None:
    """Return how words that a command does not take, joined by spaces, are given."""
    if file := SETTINGS_FILE.match(words):
        return f"A settings file is given as --config {file[0]}"
    hint = NAMED_BY_FLAGS.get(command)
    return hint and hint.format(all=shlex.quote(words), first=shlex.quote(words.partition(" ")[0]))


def _hint_for_flag(command: Any, misspelt: str) -> str | None:
    """Return what an unknown flag was meant to be: one that was removed, one of another tool, or a similar one."""
    from qlora_cli.settings.value_sources import (
        hint_for_foreign_flag,
        hint_for_removed_flag,
    )  # all settings: not sooner

    if hint := hint_for_removed_flag(command.name, misspelt):
        return hint
    if hint := hint_for_foreign_flag(command.name, misspelt):
        return hint
    flags = [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
    # Compared without dashes, which would make `--lr` similar to `--rank`.
    names = {flag.lstrip("-"): flag for flag in flags}
    matches = get_close_matches(misspelt.lstrip("-"), names, n=1)
    return f"Did you mean {names[matches[0]]}?" if matches else None
