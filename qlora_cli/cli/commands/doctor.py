"""`qlora doctor`: whether this machine can train, and what to do if it can't."""

import dataclasses
from typing import Annotated, Any

import typer

from qlora_cli.cli import options
from qlora_cli.cli.json_output import print_json
from qlora_cli.cli.stderr import redact
from qlora_cli.cli.volume import Quiet, print_next, quiet_or_normal

Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Also measure, in about ten seconds, what the GPU, or else the CPU, sustains: predicted times are by it "
        "from then on. Nothing else should run meanwhile.",
    ),
]


def doctor(measure: Measure = False, quiet: Quiet = False, json: options.Json = False) -> None:
    """Check whether this machine can train: packages, GPU, bitsandbytes, hub, disk. Exit code 1 if it can't."""
    from qlora_cli.cli.progress.reporters import reporting
    from qlora_cli.cli.rendering.doctor_text import render_doctor
    from qlora_cli.cli.rendering.next_steps import AFTER_DOCTOR
    from qlora_cli.doctor.all_checks import diagnose

    volume = quiet_or_normal(quiet)
    with reporting(volume) as reporter:
        report = diagnose(reporter, measures=measure)
    print_json(_redacted(dataclasses.asdict(report))) if json else render_doctor(report)
    if not report.can_train:
        raise typer.Exit(1)
    print_next(AFTER_DOCTOR, volume, as_json=json)


def _redacted(value: Any) -> Any:
    """Return `value` without tokens, because the text of an error may quote anything."""
    if isinstance(value, dict):
        return {key: _redacted(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(part) for part in value]
    return redact(value) if isinstance(value, str) else value
