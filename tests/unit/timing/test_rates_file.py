"""Measured rates are used where they hold: on their device, with their versions, from a file that is whole."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qlora_cli.cache import cache_folder
from qlora_cli.timing import rates_file
from qlora_cli.timing.rates import Rates, rates_of
from qlora_cli.timing.rates_file import DATA_SHEET, known_rates, rates_digest, store_rates

CARD, OTHER = "RTX 4090", "RTX 3090"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))


def of_card(name: str) -> Rates:
    rates = rates_of(name, 128)
    assert rates is not None
    return rates


def faster() -> Rates:
    return replace(of_card(CARD), flops=1e15, watts=0)


def damage(content: str) -> None:
    """Replace the content of the file that was written last."""
    (file,) = cache_folder("rates").glob("*.json")
    file.write_text(content, encoding="utf-8")


def test_without_a_measurement_rates_are_those_of_the_data_sheet() -> None:
    known = known_rates(CARD, card=CARD, num_sms=128)
    assert known is not None
    assert (known.rates, known.source, known.note) == (of_card(CARD), DATA_SHEET, "")
    assert known_rates("a CPU") is None


def test_measured_rates_replace_those_of_one_device_but_its_watts() -> None:
    before = rates_digest()
    store_rates(CARD, "bf16", faster())
    known = known_rates(CARD, card=CARD, num_sms=128)
    assert known is not None
    assert known.rates == replace(faster(), watts=450)
    assert known.dtype == "bf16"
    assert known.source == f"measured on this machine on {known.measured_on}"
    other = known_rates(OTHER, card=OTHER, num_sms=82)
    assert other is not None
    assert other.source == DATA_SHEET
    assert rates_digest() != before


def test_a_device_outside_the_catalogue_is_known_once_it_was_measured() -> None:
    store_rates("a CPU", "fp32", faster())
    known = known_rates("a CPU")
    assert known is not None
    assert known.rates == faster()


def test_rates_of_other_versions_are_ignored_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    store_rates(CARD, "bf16", faster())
    current = rates_file.current_versions()
    monkeypatch.setattr(rates_file, "current_versions", lambda: ("torch 99.0", *current[1:]))
    known = known_rates(CARD, card=CARD, num_sms=128)
    assert known is not None
    assert known.rates == of_card(CARD)
    assert "another torch: qlora doctor --measure" in known.note


def stored() -> dict[str, object]:
    store_rates(CARD, "bf16", faster())
    (file,) = cache_folder("rates").glob("*.json")
    content: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(
    "change",
    [{"rates": {"flops": 1}}, {"device": OTHER}, *({"flops": bad} for bad in (0, -1, float("inf"), float("nan")))],
    ids=["missing", "device", "zero", "negative", "infinite", "nan"],
)
def test_a_file_that_is_damaged_is_ignored_with_a_note(change: dict[str, object]) -> None:
    content = stored()
    rates = content["rates"]
    assert isinstance(rates, dict)
    damage(json.dumps({**content, **change} if "flops" not in change else {**content, "rates": {**rates, **change}}))
    known = known_rates(CARD, card=CARD, num_sms=128)
    assert known is not None
    assert known.rates == of_card(CARD)
    assert "qlora doctor --measure measures them again" in known.note


@pytest.mark.parametrize("length", [0, 1, 40, 300])
def test_a_file_that_is_cut_off_is_ignored_with_a_note(length: int) -> None:
    damage(json.dumps(stored())[:length])
    known = known_rates(CARD, card=CARD, num_sms=128)
    assert known is not None
    assert known.rates == of_card(CARD)
    assert known.note


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.json"
    target.write_text(json.dumps(stored()), encoding="utf-8")
    (file,) = cache_folder("rates").glob("*.json")
    file.unlink()
    file.symlink_to(target)
    known = known_rates(CARD, card=CARD, num_sms=128)
    assert known is not None
    assert known.rates == of_card(CARD)
