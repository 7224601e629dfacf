"""Random and damaged files are read or refused, the same in every run; `scripts/fuzz.py` draws others for minutes."""

from pathlib import Path

import pytest

from qlora_cli.errors import DataError
from tests.fuzzing import frame
from tests.fuzzing.frame import Generator, Target, play
from tests.fuzzing.targets import TARGETS


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_foreign_input_is_read_or_refused(tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    play_round = target.prepare(tmp_path)
    outcomes = [play(target, play_round, seed) for seed in range(target.num_rounds)]
    findings = {seed: outcome.finding for seed, outcome in enumerate(outcomes) if outcome.finding}
    assert findings == {}
    assert any(not outcome.is_refused for outcome in outcomes)  # it is not all nonsense


def test_a_round_is_determined_by_its_seed_and_reports_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def play_round(chance: Generator) -> None:
        drawn.append(chance.random())
        if drawn[-1] < 0.5:
            raise DataError("refused")
        raise LookupError("no error of ours")

    target = Target(name="a", prepare=lambda _: play_round, num_rounds=1)
    outcomes = [play(target, target.prepare(tmp_path), seed) for seed in (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)]
    assert drawn[:5] == drawn[5:]
    assert outcomes[:5] == outcomes[5:]
    assert [outcome.is_refused for outcome in outcomes] == [number < 0.5 for number in drawn]
    assert all("LookupError: no error of ours" in str(each.finding) for each in outcomes if not each.is_refused)
    monkeypatch.setattr(frame, "MOST_SECONDS", -1)
    assert "it took" in str(play(target, lambda _: None, 0).finding)


def test_a_parquet_file_whose_description_of_a_column_contradicts_itself_is_refused(tmp_path: Path) -> None:
    target = TARGETS["parquet"]
    outcome = play(target, target.prepare(tmp_path), 1_796_031_392_222)  # it ended the process
    assert outcome.is_refused
    assert outcome.finding is None
