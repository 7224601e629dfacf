"""Every way a command can fail, as a message on stderr and an exit code. Nothing else prints errors."""

import errno
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperGroup

from qlora_cli.cli.lasting_stream import dropped_without_terminal, let_go
from qlora_cli.cli.options import WHERE
from qlora_cli.cli.stderr import print_line, redact
from qlora_cli.errors import Problem, QloraError, SettingsError, UsageError, is_panic
from qlora_cli.settings.value_sources import hint_for_removed_flag

MOST_TRACEBACK_LINES, FIRST_LINES = 40, 12
PANIC = "The tokenizer.json of the model is the likeliest one; get its files anew from where they came from."
BUG_REPORT = "This is a bug in qlora; please report it with the lines above."


class FailureGroup(TyperGroup):
    """The root command: what its subcommands raise ends here, also under `CliRunner`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the root."""
        with failures_explained(args, ctx.meta):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run the subcommand."""
        with failures_explained([*ctx._protected_args, *ctx.args], ctx.meta):
            return super().invoke(ctx)


@contextmanager
def failures_explained(arguments: list[str], known: Mapping[str, Any]) -> Iterator[None]:
    """Turn an exception into a message and `typer.Exit`; `arguments` tell whether `--json` was asked for.

    `known` is what the command has left in its context: where its settings were given.
    """
    as_json = "--json" in arguments
    try:
        yield
    except QloraError as error:
        _fail(_placed(error, known.get(WHERE)), as_json=as_json)
    except typer.TyperException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # typer exports no name for it; its message is the help
            print_line(error.format_message())
            raise typer.Exit(error.exit_code) from None
        _fail(_explain_usage(error), as_json=as_json)
    except KeyboardInterrupt:
        _fail(_with_code(QloraError("interrupted"), 130), as_json=as_json)
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        let_go(sys.stdout)
        raise typer.Exit(141) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # noqa: BLE001 - the last stop: a bug of ours, told with its traceback
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            try:
                sys.stdout.flush()
            except OSError:  # it is stdout that is full, not the run's own files
                let_go(sys.stdout)
            _fail(QloraError(f"the disk is full: {error}", hint="Free disk space and try again."), as_json=as_json)
        print_line(_traceback_of(error))
        _fail(QloraError(f"{type(error).__name__}: {error}", hint=BUG_REPORT), as_json=as_json)
    except BaseException as error:
        if not is_panic(error):
            raise
        reason = str(error).partition("\n")[0]
        _fail(
            _with_code(QloraError(f"a file of others made a library panic: {reason}", hint=PANIC), 2), as_json=as_json
        )


def _traceback_of(error: Exception) -> str:
    """Return the traceback of `error` in at most `MOST_TRACEBACK_LINES` lines: how it begins, and how it ends."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    if len(lines) <= MOST_TRACEBACK_LINES:
        return "\n".join(lines)
    last = lines[FIRST_LINES - MOST_TRACEBACK_LINES + 1 :]
    left_out = f"  … {len(lines) - FIRST_LINES - len(last):,} lines left out …"
    return "\n".join([*lines[:FIRST_LINES], left_out, *last])


def problems_of(error: QloraError) -> tuple[Problem, ...]:
    """Return the problems that `error` carries; most carry none."""
    return error.problems if isinstance(error, SettingsError) else ()


def _fail(error: QloraError, *, as_json: bool) -> None:
    with dropped_without_terminal(sys.stderr):  # the exit code stays
        _tell(error)
    if as_json:
        try:
            typer.echo(json.dumps({"error": _as_object(error)}, indent=2))
        except OSError:  # a full disk, or no reader: stderr has said what went wrong, and the exit code stays
            let_go(sys.stdout)
    raise typer.Exit(error.exit_code) from None


def _tell(error: QloraError) -> None:
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


def _placed(error: QloraError, where_of: Callable[[str], str] | None) -> QloraError:
    """Return an error that begins with where the setting was given that it is about."""
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
    """Return a usage error of the parser as ours, with the nearest flag for a misspelt one."""
    context = getattr(error, "ctx", None)
    hint = f"See {context.command_path} --help" if context is not None else None
    message = error.format_message().split(" (Possible options")[0]
    misspelt = getattr(error, "option_name", None)
    if misspelt and context is not None:
        flags = [flag for parameter in context.command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
        # The dashes are left out: they alone would make `--lr` look like `--rank`.
        names = {flag.lstrip("-"): flag for flag in flags}
        if matches := get_close_matches(misspelt.lstrip("-"), names, n=1):
            hint = f"Did you mean {names[matches[0]]}?"
        hint = hint_for_removed_flag(context.command.name, misspelt) or hint
    usage = UsageError(message[:1].lower() + message[1:].rstrip("."), hint=hint)
    return _with_code(usage, error.exit_code)
