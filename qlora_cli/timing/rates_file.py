"""The rates that were measured on this machine, and the runs that correct them: files for each device in the cache.

Imports no torch. They hold for the versions that they were measured with: those of torch, bitsandbytes and the driver.
"""

import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qlora_cli.cache import cache_folder, code_digests, digest_of, versions_of
from qlora_cli.hardware.driver import dotted, driver_cuda_version
from qlora_cli.timing.rates import Rates, rates_of
from qlora_cli.timing.run_ratios import Correction, RunKey, RunRatio, read_ratios, store_ratio
from qlora_cli.writing import PRIVATE_FILE, private_folder, unsafe_reason, write_file

FOLDER = "rates"
MEASURE = "qlora doctor --measure"
DATA_SHEET = "data sheet"
PACKAGES = ("torch", "bitsandbytes")
# The code by which the seconds of a step are predicted: a ratio to those of other code says nothing.
PREDICTING = ("timing/roofline.py", "memory/tracing", "memory/costs/step_time.py")
RATES, RUNS = ".json", ".jsonl"


@dataclass(frozen=True, kw_only=True)
class MeasuredRates:
    """The rates of a device, with products in `dtype`; `measured_on` is a date, such as 2026-12-01."""

    device: str
    dtype: str
    measured_on: str
    versions: tuple[str, ...]
    rates: Rates


@dataclass(frozen=True, kw_only=True)
class KnownRates:
    """The rates of a device, and where they come from.

    Attributes:
        dtype: That of the products which were measured; empty for those of a data sheet.
        measured_on: The date; empty for those of a data sheet.
        note: Why measured rates, or runs, are ignored, in a sentence; else empty.
        runs: Those on the device that correct predictions, the latest last.
    """

    rates: Rates
    dtype: str = ""
    measured_on: str = ""
    note: str = ""
    runs: tuple[RunRatio, ...] = ()

    @property
    def source(self) -> str:
        """Where the rates come from, in words."""
        return f"measured on this machine on {self.measured_on}" if self.measured_on else DATA_SHEET

    def key_of(self, device: str, kind: str, limit: str) -> RunKey:
        """Return what runs have in common whose steps are predicted by these rates."""
        rates = json.dumps(asdict(self.rates), sort_keys=True)
        return RunKey(device=device, kind=kind, limit=limit, basis=digest_of([rates, *code_digests(PREDICTING)]))

    def correction(self, key: RunKey) -> Correction | None:
        """Return the correction of a prediction by earlier runs; None if there were none of the kind."""
        ratios = [run.ratio for run in self.runs if run.key == key]
        return Correction.of(ratios) if ratios else None


def known_rates(device: str, *, card: str = "", num_sms: int = 1) -> KnownRates | None:
    """Return the rates of a device by its name: measured ones, else those of a data sheet; None if there are neither.

    `card` is its name in the catalogue, if it has one.

    A file that can't be read, or was written with other versions, is ignored with a note.
    """
    of_card = rates_of(card, num_sms)
    measured, note = _measured(device)
    if measured is None and of_card is None:
        return None
    runs, note_on_runs = _runs(device)
    notes = "; ".join(filter(None, (note, note_on_runs)))
    if measured is not None:
        rates = measured.rates if of_card is None else replace(measured.rates, watts=of_card.watts)
        return KnownRates(rates=rates, dtype=measured.dtype, measured_on=measured.measured_on, note=notes, runs=runs)
    assert of_card is not None, "checked above"
    return KnownRates(rates=of_card, note=notes, runs=runs)


def store_rates(device: str, dtype: str, rates: Rates) -> Path:
    """Store the rates of a device, measured today with the versions that are installed; return the file.

    Raises:
        OSError: it can't be written.
    """
    measured = MeasuredRates(
        device=device,
        dtype=dtype,
        measured_on=datetime.now(UTC).date().isoformat(),
        versions=current_versions(),
        rates=rates,
    )
    file = _file_of(device, RATES)
    private_folder(file.parent)
    write_file(file, json.dumps(asdict(measured), indent=2) + "\n", mode=PRIVATE_FILE)
    return file


def store_run(key: RunKey, ratio: float) -> None:
    """Store how long a step of a run took as a multiple of its prediction without corrections.

    Raises:
        OSError: it can't be written.
    """
    store_ratio(_file_of(key.device, RUNS), key, ratio, current_versions())


def current_versions() -> tuple[str, ...]:
    """Return the versions that measured rates depend on, each with its name."""
    driver = driver_cuda_version()
    return (*versions_of(PACKAGES), f"driver {'none' if driver is None else dotted(driver)}")


def rates_digest() -> str:
    """Return a digest of all measured rates and of all runs, on which predicted times depend."""
    files = sorted(file for file in cache_folder(FOLDER).glob("*.json*") if file.suffix in (RATES, RUNS))
    return digest_of([*current_versions(), *(_text_of(file) for file in files)])


def _measured(device: str) -> tuple[MeasuredRates | None, str]:
    """Return the measured rates of a device; None and a note, empty if there is no file, if they can't be used."""
    file = _file_of(device, RATES)
    if not file.exists():
        return None, ""
    try:
        measured = TypeAdapter(MeasuredRates).validate_json(_text_of(file))
    except ValidationError:
        return None, f"the rates that were measured here can't be read: {MEASURE} measures them again"
    if measured.device != device or not _are_plausible(measured.rates):
        return None, f"the rates that were measured here are damaged: {MEASURE} measures them again"
    if changed := set(measured.versions) ^ set(current_versions()):
        names = ", ".join(sorted({version.partition(" ")[0] for version in changed}))
        return None, f"the rates that were measured here are of another {names}: {MEASURE} measures them again"
    return measured, ""


def _runs(device: str) -> tuple[tuple[RunRatio, ...], str]:
    """Return the runs on a device that may correct predictions, and why others may not, in a sentence."""
    file = _file_of(device, RUNS)
    return read_ratios(_text_of(file), device, current_versions()) if file.exists() else ((), "")


def _are_plausible(rates: Rates) -> bool:
    may_be_zero = {"kernel_seconds", "watts", "is_host"}
    return all(isfinite(value) and value > (-1 if name in may_be_zero else 0) for name, value in asdict(rates).items())


def _text_of(file: Path) -> str:
    """Return the text of a file of ours; empty if it can't be read or is not ours."""
    try:
        return "" if unsafe_reason(file) is not None else file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _file_of(device: str, suffix: str) -> Path:
    return cache_folder(FOLDER) / f"{digest_of([device])}{suffix}"
