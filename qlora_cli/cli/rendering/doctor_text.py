"""The text of `qlora doctor`: a status, a name and a finding for each check."""

import textwrap
from collections.abc import Mapping

from rich.text import Text

from qlora_cli.cli.console import console, print_lines, title
from qlora_cli.cli.stderr import redact
from qlora_cli.doctor.findings import Check, Json, Report, Status
from qlora_cli.units import format_rate

WORDS = {Status.OK: "ok", Status.WARNING: "warn", Status.FAILED: "FAIL", Status.SKIPPED: "skip"}
STYLES = {Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red", Status.SKIPPED: "dim"}
# The rates of `doctor --measure`: their names, and what a second of them counts.
RATES = {
    "flops": ("products", "FLOP"),
    "fp32_flops": ("products in fp32", "FLOP"),
    "attention_flops": ("attention", "FLOP"),
    "num_bytes": ("memory, element by element", "B"),
    "dequantized_bytes": ("memory, dequantizing NF4", "B"),
    "narrow_bytes": ("memory, products of an adapter", "B"),
    "host_copy_bytes": ("copies from the host", "B"),
}


def render_doctor(report: Report) -> None:
    """Print the verdict and a line for each check, with advice below a check that is not ok."""
    title(verdict(report))
    width = max(len(check.name) for check in report.checks)
    for check in report.checks:
        _print_check(check, width)
        if isinstance(measured := check.details.get("measured"), Mapping):
            print_lines(rate_lines(measured, check.details.get("data_sheet")))


def rate_lines(measured: Mapping[str, Json], of_card: Json) -> list[str]:
    """Return a table of measured rates, next to what the card's data sheet makes expect, if it has one."""
    expected = of_card if isinstance(of_card, Mapping) else {}
    width = max(len(label) for label, _ in RATES.values())
    lines = [
        f"{'':8}{label:<{width}} {_rate(measured[name], unit):>14}"
        + (f"   {_rate(expected[name], unit)} by the data sheet" if name in expected else "")
        for name, (label, unit) in RATES.items()
    ]
    dispatch = measured["dispatch_seconds"]
    assert isinstance(dispatch, float)
    return [*lines, f"{'':8}{'the host, for an operation':<{width}} {1e6 * dispatch:>11.1f} µs"]


def _rate(value: Json, unit: str) -> str:
    assert isinstance(value, int | float)
    return format_rate(value, unit)


def verdict(report: Report) -> str:
    """Return whether the machine can train, and the number of checks by status."""
    counts = [
        f"{count} {status}" for status in Status if (count := sum(check.status == status for check in report.checks))
    ]
    can = "can" if report.can_train else "can't"
    return f"This machine {can} train ({', '.join(counts)})"


def _print_check(check: Check, name_width: int) -> None:
    head = f"  {WORDS[check.status]:<4}  {check.name:<{name_width}}  "
    finding, *more = _lines(check.finding, len(head))
    line = Text.assemble(head[:2], (head[2:6], STYLES[check.status]), (head[6:], "cyan"), finding)
    console().print(line, soft_wrap=True)
    advice = _lines(f"-> {check.advice}", len(head)) if check.advice else []
    for text in more + advice:
        console().print(Text(" " * len(head) + text), soft_wrap=True)


def _lines(text: str, indent: int) -> list[str]:
    """Return `text` wrapped to the width of a terminal next to the names; unbroken without a terminal."""
    text = redact(" ".join(text.split()))
    out = console()
    if not out.is_terminal:
        return [text]
    # Flags and addresses are not broken, so that they can be copied.
    return textwrap.wrap(text, max(out.width - indent, 30), break_long_words=False, break_on_hyphens=False)
