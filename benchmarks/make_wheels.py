"""Make a folder of wheels for a machine without a network, small enough to be carried there.

It holds what this project and the GPU tests need and what the machine does not have, or has in a version outside the
bounds of `pyproject.toml`: in the versions of `constraints.txt`, for the machine's Python. `--installed` is what
`python3 -m pip freeze` prints there; a line may be a mere name, which counts as a version without an upper bound.
PyTorch is never carried. Of bitsandbytes' libraries, one for each CUDA version, only one and that for the CPU are.
"""

import argparse
import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.parser import Parser
from pathlib import Path

# Without this, a script run as a file does not find its siblings.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from benchmarks.records import ROOT

MIB = 1024**2
INSTALLED = ROOT / "benchmarks" / "data" / "installed_with_cuda_13.txt"
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")  # of the `dev` group, what the GPU tests import
NEWEST_GLIBC_MINOR = 39  # pip matches the platforms that it is given exactly, so each is given
LIBRARY = re.compile(r"libbitsandbytes_(\w+)\.so$")
UPPER_BOUNDS = ("<", "<=", "==", "~=", "===")


class WheelsError(Exception):
    """The folder can't be made; the message says why and what to do."""


@dataclass(kw_only=True)
class Machine:
    """The machine that the wheels are for: its Python, such as `3.12`, and the versions that are installed there.

    A version is None where only the name is known.
    """

    python: str
    installed: Mapping[str, Version | None] = field(default_factory=dict)

    def satisfies(self, name: str, specifier: SpecifierSet) -> bool:
        """Return whether what is installed there is within `specifier`, as far as is known."""
        if name not in self.installed:
            return False
        version = self.installed[name]
        if version is None:
            return not any(one.operator in UPPER_BOUNDS for one in specifier)
        return specifier.contains(version, prereleases=True)

    def applies(self, requirement: Requirement, extras: Iterable[str] = ()) -> bool:
        """Return whether the marker of a requirement holds there, for one of the `extras` or without any."""
        environment = {name: str(value) for name, value in default_environment().items()} | {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "sys_platform": "linux",
            "platform_system": "Linux",
            "platform_machine": "x86_64",
            "os_name": "posix",
        }
        marker = requirement.marker
        return marker is None or any(marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras))


def read_installed(text: str) -> dict[str, Version | None]:
    """Return the versions in the output of `pip freeze`; comments are ignored.

    Raises:
        WheelsError: a line is neither `name` nor `name==version`.
    """
    installed: dict[str, Version | None] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        # A package installed from a file or a repository is listed as `name @ address`: its version is not known.
        match = re.fullmatch(r"([\w.-]+)(?:==(\S+)| @ .*)?", content)
        if match is None:
            raise WheelsError(f"line {number} of the installed packages is not as pip freeze prints it: {content}")
        installed[canonicalize_name(match[1])] = Version(match[2]) if match[2] else None
    return installed


def own_requirements() -> list[Requirement]:
    """Return what the package and its GPU tests require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = [Requirement(text) for text in project["dependency-groups"]["dev"]]
    return [
        *map(Requirement, project["project"]["dependencies"]),
        *(tool for tool in tools if canonicalize_name(tool.name) in TEST_TOOLS),
    ]


class Folder:
    """The wheels for a machine, each of which is downloaded when something first requires it."""

    def __init__(self, path: Path, machine: Machine) -> None:
        self._path = path
        self._machine = machine
        self._specifiers: dict[str, SpecifierSet] = {}
        self._wheels: dict[str, Path] = {}

    def add(self, requirements: Iterable[Requirement]) -> None:
        """Add what is required, and what that requires in turn.

        Raises:
            WheelsError: PyTorch is not installed there, a wheel can't be downloaded, or two requirements conflict.
        """
        waiting = [one for one in requirements if self._machine.applies(one)]
        while waiting:
            requirement = waiting.pop(0)
            name = canonicalize_name(requirement.name)
            combined = self._specifiers.get(name, SpecifierSet()) & requirement.specifier
            self._specifiers[name] = combined
            if name in self._wheels:
                self._check(name, combined)
            elif not self._machine.satisfies(name, combined):
                self._wheels[name] = wheel = self._download(name, combined)
                metadata = required_by(wheel)
                waiting += [one for one in metadata if self._machine.applies(one, requirement.extras)]

    def _check(self, name: str, specifier: SpecifierSet) -> None:
        version = Version(self._wheels[name].name.split("-")[1])
        if not specifier.contains(version, prereleases=True):
            raise WheelsError(f"{name} {version} is carried, but {specifier} is required: pin it in constraints.txt")

    def _download(self, name: str, specifier: SpecifierSet) -> Path:
        if name == "torch":
            raise WheelsError(f"the machine needs torch{specifier}, which is too large to be carried")
        with tempfile.TemporaryDirectory(dir=self._path) as directory:
            command = [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"),
                *("--python-version", self._machine.python, "--implementation", "cp"),
                *(part for platform in platforms() for part in ("--platform", platform)),
                *("--constraint", str(ROOT / "constraints.txt"), "--dest", directory, f"{name}{specifier}"),
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = list(Path(directory).glob("*.whl"))
            if done.returncode != 0 or len(wheels) != 1:
                raise WheelsError(f"{name}{specifier} can't be downloaded: {done.stderr.strip()[-500:]}")
            return wheels[0].rename(self._path / wheels[0].name)


def platforms() -> Iterator[str]:
    """Return the platforms of wheels that run on Linux on x86-64."""
    for minor in range(NEWEST_GLIBC_MINOR, 4, -1):
        yield f"manylinux_2_{minor}_x86_64"
    yield from ("manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64")


def required_by(wheel: Path) -> list[Requirement]:
    """Return what a wheel requires."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (entry for entry in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", entry))
        metadata = Parser().parsestr(archive.read(name).decode("utf-8"))
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def cut(wheel: Path, libraries: Sequence[str]) -> None:
    """Leave of bitsandbytes' libraries only these, such as `cpu` and `cuda130`, in the wheel and in its record.

    Raises:
        WheelsError: the wheel does not have one of them.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {entry: match[1] for entry in archive.namelist() if (match := LIBRARY.search(entry))}
        if missing := set(libraries) - set(found.values()):
            raise WheelsError(f"{wheel.name} has no {', '.join(sorted(missing))}, only {', '.join(found.values())}")
        contents = {
            entry: archive.read(entry) for entry in archive.namelist() if found.get(entry, libraries[0]) in libraries
        }
    (record,) = (entry for entry in contents if entry.endswith(".dist-info/RECORD"))
    contents[record] = _record(contents, record)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for entry, content in contents.items():
            archive.writestr(entry, content)


def _record(contents: Mapping[str, bytes], own_name: str) -> bytes:
    """Return the RECORD of a wheel: path, hash and size of each file, and of itself only the path."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    for entry, content in contents.items():
        if entry == own_name:
            writer.writerow([entry, "", ""])
        else:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            writer.writerow([entry, f"sha256={digest}", len(content)])
    return lines.getvalue().encode("utf-8")


def make_folder(path: Path, machine: Machine, cuda: str) -> list[Path]:
    """Fill the new folder `path` and return its wheels, the largest first.

    Raises:
        WheelsError: see `Folder.add` and `cut`.
    """
    path.mkdir(parents=True)
    Folder(path, machine).add(own_requirements())
    for wheel in path.glob("bitsandbytes-*.whl"):
        cut(wheel, ["cpu", f"cuda{cuda}"])
    return sorted(path.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)


def main() -> int:
    """Make the folder and print what is in it; return 1 if it can't be made or is too large."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to make")
    parser.add_argument("--python", default="3.12", help="the machine's version of Python (default: 3.12)")
    parser.add_argument("--cuda", default="130", help="the CUDA version of its PyTorch (default: 130)")
    parser.add_argument("--installed", type=Path, default=INSTALLED, help="what pip freeze prints there")
    parser.add_argument("--limit-mib", type=float, default=64, help="most MiB of all wheels together (default: 64)")
    arguments = parser.parse_args()
    if arguments.folder.exists():
        print(f"{arguments.folder} exists: name a new folder, or delete it", file=sys.stderr)
        return 1
    try:
        installed = read_installed(arguments.installed.read_text(encoding="utf-8"))
        wheels = make_folder(arguments.folder, Machine(python=arguments.python, installed=installed), arguments.cuda)
    except WheelsError as error:
        print(f"No complete folder of wheels: {error}", file=sys.stderr)
        return 1
    for wheel in wheels:
        print(f"{wheel.stat().st_size / MIB:8.2f} MiB  {wheel.name}")
    total_mib = sum(wheel.stat().st_size for wheel in wheels) / MIB
    print(f"{total_mib:8.2f} MiB in all")
    if total_mib > arguments.limit_mib:
        print(f"That is more than {arguments.limit_mib:g} MiB: what can be installed there?", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
