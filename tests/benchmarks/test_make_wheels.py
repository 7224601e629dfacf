"""The folder of wheels for a machine without a network: what is carried, and what is cut out of bitsandbytes."""

import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from benchmarks.make_wheels import (
    INSTALLED,
    TEST_TOOLS,
    Folder,
    Machine,
    WheelsError,
    cut,
    own_requirements,
    read_installed,
    required_by,
)


def wheel_of(folder: Path, name: str, version: str, files: Mapping[str, bytes], requires: Sequence[str] = ()) -> Path:
    """Write a wheel."""
    info = f"{name}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {one}" for one in requires]
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in files.items():
            archive.writestr(entry, content)
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "".join(f"{entry},,\n" for entry in files))
    return path


@pytest.mark.parametrize(
    ("specifier", "is_there"),
    [(">=5", True), (">=5.18,<6", False), ("", True)],
)
def test_what_is_installed_in_a_version_within_the_bounds_is_not_carried(specifier: str, is_there: bool) -> None:
    machine = Machine(python="3.12", installed={"transformers": Version("5.17.0")})
    assert machine.satisfies("transformers", SpecifierSet(specifier)) is is_there
    assert not machine.satisfies("trl", SpecifierSet(specifier))


def test_a_version_that_is_not_known_counts_where_no_bound_is_above_it() -> None:
    machine = Machine(python="3.12", installed={"pyarrow": None})
    assert machine.satisfies("pyarrow", SpecifierSet(">=22"))
    assert not machine.satisfies("pyarrow", SpecifierSet(">=22,<27"))
    assert not machine.satisfies("pyarrow", SpecifierSet("==26.*"))


def test_installed_packages_are_read_as_pip_freeze_prints_them() -> None:
    text = "# a comment\nhuggingface_hub==1.33.0\nPyYAML\n\nlocal @ file:///wheels/local.whl\n"
    assert read_installed(text) == {"huggingface-hub": Version("1.33.0"), "pyyaml": None, "local": None}
    with pytest.raises(WheelsError, match=r"line 2 .*-e git"):
        read_installed("numpy==2.0\n-e git+https://example.com/a.git\n")


def test_the_listed_machine_has_what_is_too_large_to_be_carried() -> None:
    machine = Machine(python="3.12", installed=read_installed(INSTALLED.read_text(encoding="utf-8")))
    required = {one.name: one.specifier for one in own_requirements()}
    assert set(TEST_TOOLS) < set(required)
    for name in ("torch", "pyarrow", "numpy", "matplotlib"):
        assert machine.satisfies(name, required[name]), name


def test_markers_are_those_of_the_machine() -> None:
    machine = Machine(python="3.12")
    assert machine.applies(Requirement("a; python_version < '3.13' and sys_platform == 'linux'"))
    assert not machine.applies(Requirement("a; python_version < '3.12'"))
    assert not machine.applies(Requirement("a; extra == 'http'"))
    assert machine.applies(Requirement("a; extra == 'http'"), ["http"])


def test_pytorch_is_never_carried(tmp_path: Path) -> None:
    with pytest.raises(WheelsError, match=r"the machine needs torch>=2\.11"):
        Folder(tmp_path, Machine(python="3.12")).add([Requirement("torch>=2.11")])


def test_a_wheel_says_what_it_requires(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, "outer", "1.0", {"outer.py": b""}, ["inner>=2", "other; extra == 'x'"])
    assert [one.name for one in required_by(wheel)] == ["inner", "other"]


def test_bitsandbytes_is_cut_to_two_libraries_and_still_installs(tmp_path: Path) -> None:
    libraries = {
        f"bitsandbytes/libbitsandbytes_{name}.so": name.encode() * 1000 for name in ("cpu", "cuda128", "cuda130")
    }
    wheel = wheel_of(tmp_path, "bitsandbytes", "0.50.2", {"bitsandbytes/__init__.py": b"", **libraries})
    cut(wheel, ["cpu", "cuda130"])
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target"]
    subprocess.run([*install, str(tmp_path / "installed"), str(wheel)], check=True)
    installed = tmp_path / "installed" / "bitsandbytes"
    assert sorted(path.name for path in installed.glob("*.so")) == [
        "libbitsandbytes_cpu.so",
        "libbitsandbytes_cuda130.so",
    ]
    assert (installed / "libbitsandbytes_cuda130.so").read_bytes() == b"cuda130" * 1000


def test_a_cuda_version_that_bitsandbytes_has_no_library_for_is_named(tmp_path: Path) -> None:
    files = {"bitsandbytes/libbitsandbytes_cpu.so": b"", "bitsandbytes/libbitsandbytes_cuda130.so": b""}
    wheel = wheel_of(tmp_path, "bitsandbytes", "0.50.2", files)
    with pytest.raises(WheelsError, match="has no cuda99, only cpu, cuda130"):
        cut(wheel, ["cpu", "cuda99"])
