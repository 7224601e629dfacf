"""Private names of other libraries: all that are used are listed, and each is still as it was read."""

import importlib.metadata
from collections import defaultdict
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.support.source.private_names import PrivateUse, private_uses_in
from tests.support.source.seams import DOCUMENTED, ENDS_OF_KEYS, PHRASES, SEAMS, Kind, Seam, signature_of

ROOT = Path(__file__).parents[2]
# Where the trainers' private side may be touched.
TRAINER_SEAM = "qlora_cli/training/trainer_seam.py"
MOST_USES = 103  # it may fall, but not rise: for a new one, remove one or argue for it in a decision


@cache
def used() -> dict[str, list[PrivateUse]]:
    """Return where the package uses each private name of another library."""
    uses_by_name: dict[str, list[PrivateUse]] = defaultdict(list)
    for use in private_uses_in(ROOT, "qlora_cli"):
        if use.name not in DOCUMENTED and (use.file, use.name) not in ENDS_OF_KEYS:
            uses_by_name[use.name].append(use)
    return uses_by_name


@pytest.mark.parametrize("seam", [*SEAMS, *PHRASES], ids=lambda seam: f"{seam.owner}.{seam.name}")
def test_a_private_name_exists_and_has_the_expected_signature(seam: Seam) -> None:
    fault = seam.fault()
    library, _, version = seam.read_at.partition(" ")
    uses = "".join(f"\n  {use}" for use in used().get(seam.name, ()))
    assert fault is None, f"{library} {importlib.metadata.version(library)}: {fault}{uses}"
    assert version
    assert seam.why


def test_every_private_name_that_the_package_uses_is_listed() -> None:
    listed = {seam.name for seam in SEAMS}
    unlisted = [str(use) for name, uses in used().items() if name not in listed for use in uses]
    assert not unlisted, (
        "list them in tests/support/source/seams.py, with the reason, or use a public way:\n" + "\n".join(unlisted)
    )


def test_every_listed_name_is_used() -> None:
    assert {seam.name for seam in SEAMS} <= used().keys()
    assert len({(seam.owner, seam.name) for seam in SEAMS}) == len(SEAMS)


def test_the_number_of_uses_does_not_grow() -> None:
    assert 0 < sum(map(len, used().values())) <= MOST_USES


def test_the_trainers_private_side_is_touched_in_one_module() -> None:
    of_trainers = {seam.name for seam in SEAMS if seam.owner.rpartition(".")[2] in ("Trainer", "SFTTrainer")}
    assert {use.file for name in of_trainers for use in used()[name]} == {TRAINER_SEAM}


def test_a_name_that_is_gone_or_has_another_signature_is_described() -> None:
    real = next(seam for seam in SEAMS if seam.name == "_get_grad_norm")
    gone = replace(real, name="_get_gradient_norm").fault()
    assert gone is not None
    assert "transformers.Trainer has no function _get_gradient_norm any more (read at transformers 5." in gone
    changed = replace(real, signature="self, model").fault()
    assert changed is not None
    assert "_get_grad_norm takes (self, model, grad_norm=) instead of (self, model)" in changed
    absent = replace(real, owner="transformers.NoTrainer").fault()
    assert absent is not None
    assert absent.startswith("transformers.NoTrainer is gone")
    for kind in (Kind.ATTRIBUTE, Kind.MODULE, Kind.OPERATOR, Kind.WORD):
        one = next(seam for seam in (*SEAMS, *PHRASES) if seam.kind == kind)
        assert one.fault() is None
        assert replace(one, name="_never_there").fault() is not None


def test_a_signature_shows_which_arguments_are_optional() -> None:
    def function(first: int, second: int = 0, *rest: int, named: int, **options: int) -> None: ...

    assert signature_of(function) == "first, second=, *rest, named, **options"


SAMPLE = """
import torch
from torch.utils._pytree import tree_map
from collections import OrderedDict


class Ours(torch.nn.Module):
    def _save_to_state_dict(self, *arguments):  # an override
        self._own = self._parameters  # an attribute that the base gives itself
        return self._own

    def _mine(self):
        return super()._load_from_state_dict()


def look(thing, other):
    setattr(thing, "_hidden", 1)  # by its name
    thing._seen = other._mine  # the second is defined here
    thing.call(_argument=1)
    return f"{thing}_part", "name_".endswith("_tail")
"""


def test_the_search_finds_every_kind_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sample_of_seams"
    package.mkdir()
    (package / "__init__.py").write_text(SAMPLE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert {(use.name, use.kind) for use in private_uses_in(tmp_path, package.name)} == {
        ("_pytree", "import"),
        ("_save_to_state_dict", "override"),
        ("_parameters", "access"),
        ("_load_from_state_dict", "access"),
        ("_hidden", "text"),
        ("_seen", "access"),
        ("_argument", "keyword"),
    }
