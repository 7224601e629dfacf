"""The platforms of the documentation are those that doctor names, and no kernel package is missed."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from qlora_cli.__main__ import refuse_windows
from qlora_cli.doctor import checks_platform
from qlora_cli.doctor.checks_platform import KERNEL_PACKAGES, check_kernels, check_platform, judge_platform
from qlora_cli.doctor.findings import Status
from qlora_cli.platforms import (
    CPU,
    CUDA,
    MAC,
    PLATFORMS,
    ROCM,
    WINDOWS,
    WSL,
    XPU,
    Backend,
    Platform,
    Support,
    find_platform,
)

LINUX = "6.8.0-49-generic"


@pytest.mark.parametrize(
    ("system", "release", "backend", "platform"),
    [
        ("linux", LINUX, "cuda", CUDA),
        ("linux", LINUX, "cpu", CPU),
        ("linux", LINUX, "rocm", ROCM),
        ("linux", LINUX, "xpu", XPU),
        ("linux", "5.15.153.1-microsoft-standard-WSL2", "cuda", WSL),
        ("darwin", "24.1.0", "mps", MAC),
        ("darwin", "24.1.0", "cpu", MAC),
        ("win32", "11", "cuda", WINDOWS),
    ],
)
def test_a_machine_is_one_platform_of_the_table(
    system: str, release: str, backend: Backend, platform: Platform
) -> None:
    assert find_platform(system, release, backend) is platform


def test_this_machine_is_named_with_a_line_of_the_page() -> None:
    outcome = check_platform()
    page = (Path(__file__).parents[3] / "docs" / "reference" / "platforms.md").read_text(encoding="utf-8")
    assert f"| {outcome.details['platform']} | {outcome.details['support']} |" in page


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform.name)
def test_only_what_is_tested_or_meant_is_ok(platform: Platform) -> None:
    statuses = {
        Support.TESTED: Status.OK,
        Support.INTENDED: Status.OK,
        Support.UNTESTED: Status.WARNING,
        Support.NONE: Status.FAILED,
    }
    outcome = judge_platform(platform)
    assert outcome.status == statuses[platform.support]
    assert (platform.advice is None) == (platform.support in (Support.TESTED, Support.INTENDED))
    assert outcome.advice == platform.advice


def test_windows_is_refused_before_anything_is_imported(capfd: pytest.CaptureFixture[str]) -> None:
    refuse_windows("linux")
    with pytest.raises(SystemExit) as ended:
        refuse_windows("win32")
    assert ended.value.code == 2
    assert capfd.readouterr().err.startswith("error: qlora does not run on Windows itself\n  hint: Use WSL 2")


def test_packages_with_kernels_are_named_with_the_setting_that_uses_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (name, (module, used_by)) in enumerate(KERNEL_PACKAGES.items(), start=1):
        assert name not in check_kernels().finding.partition("not installed")[0]
        folder = tmp_path / str(number)
        metadata = folder / f"{name.replace('-', '_')}-{number}.0.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}.0\n", encoding="utf-8")
        (folder / f"{module}.py").write_text("", encoding="utf-8")
        monkeypatch.syspath_prepend(folder)
        outcome = check_kernels()
        assert outcome.status == Status.OK
        assert f"{name} {number}.0 ({used_by})" in outcome.finding
    for module, _ in KERNEL_PACKAGES.values():
        del sys.modules[module]
    assert "not installed" not in outcome.finding


def test_a_package_that_cannot_be_imported_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def installed(name: str) -> str:
        if name == "flash-attn-3":
            return "3.0"
        raise PackageNotFoundError(name)

    monkeypatch.setattr(checks_platform, "version", installed)
    outcome = check_kernels()
    assert outcome.status == Status.WARNING
    assert outcome.finding.startswith("flash-attn-3 3.0 can't be imported: ModuleNotFoundError")
    assert outcome.advice == "Rebuild flash-attn-3 for this PyTorch, or leave --attention flash_attention_3 out."
