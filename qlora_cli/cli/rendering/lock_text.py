"""The text of a comparison of a predicted peak with an earlier one."""

from collections.abc import Iterator

from qlora_cli.memory.report_parts import LockCheck
from qlora_cli.units import format_bytes
from qlora_cli.visible import visible


def check_lines(check: LockCheck) -> Iterator[str]:
    """Yield how far the peak moved, and the settings that may be the reason."""
    moved = "as before" if not check.change else f"{check.change:+.2%}, at most {check.max_change:.2%} is allowed"
    yield f"{format_bytes(check.predicted_bytes)} now, {format_bytes(check.locked_bytes)} in {check.file}: {moved}"
    for one in check.changed_settings:
        yield f"{visible(one.setting)} is {visible(str(one.now))}, and was {visible(str(one.before))}"


def failure_line(check: LockCheck) -> str:
    """Return the line for a peak that moved too far."""
    return (
        f"failed: the predicted peak moved by {check.change:+.2%} from that in {check.file}, more than "
        f"{check.max_change:.2%}; if that is meant, write it again with --write-lock"
    )
