"""Reproducible kernels hold for a run, and the process is afterwards as it was."""

import os
from typing import Any

import pytest
import torch

from qlora_cli.settings.models import TrainingSettings
from qlora_cli.training.determinism import VARIABLES, determinism

CONFIG = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def workspaces(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stand for a GPU on which a product has been computed: PyTorch holds one workspace of the size of that time."""
    held: dict[str, Any] = {"of": os.environ.get(CONFIG)}

    def clear() -> None:
        held.clear()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    return held


def multiply(held: dict[str, Any]) -> None:
    """Do as PyTorch does at a product: use the workspace that is held, as large as the environment says now."""
    now = os.environ.get(CONFIG)
    assert held.setdefault("of", now) == now, "the workspace has another size than cuBLAS believes"


@pytest.mark.parametrize("before", [None, ":4096:8"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_workspace_is_used_with_a_size_that_it_does_not_have(
    monkeypatch: pytest.MonkeyPatch, workspaces: dict[str, Any], before: str | None, fails: bool
) -> None:
    monkeypatch.delenv(CONFIG, raising=False)
    if before is not None:
        monkeypatch.setenv(CONFIG, before)
        workspaces["of"] = before
    multiply(workspaces)
    for is_deterministic in (True, False, True):
        try:
            with determinism(TrainingSettings(full_determinism=is_deterministic)):
                assert (os.environ.get(CONFIG) == ":16:8") == is_deterministic
                multiply(workspaces)
                if fails:
                    raise ValueError
        except ValueError:
            assert fails
        assert os.environ.get(CONFIG) == before
        multiply(workspaces)


def test_without_a_gpu_nothing_is_asked_of_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: os.environ.get(name) for name in VARIABLES}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delattr(torch._C, "_cuda_clearCublasWorkspaces", raising=False)
    with determinism(TrainingSettings(full_determinism=True)):
        torch.use_deterministic_algorithms(True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert {name: os.environ.get(name) for name in VARIABLES} == before
