"""The Dockerfile, checked without an engine: its files, its packages, its user, its caches and its entry point."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer.main
from packaging.requirements import Requirement

from qlora_cli.cli.app import app
from tests.contract.test_docs import parse

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PAGE = (ROOT / "docs" / "how-to" / "docker.md").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with what they are given, in one line each."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, given.strip()) for name, _, given in (line.partition(" ") for line in lines)]


def given_to(name: str) -> list[str]:
    return [given for instruction, given in instructions() if instruction == name]


def commands() -> list[list[str]]:
    """Return the words of each command that is run."""
    return [shlex.split(command) for given in given_to("RUN") for command in given.split("&&")]


def copied() -> list[str]:
    return [source for given in given_to("COPY") for source in given.split()[:-1]]


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for given in given_to("ENV") for word in shlex.split(given))


def test_the_instructions_are_known_and_in_an_order_that_works() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) == {"ARG", "FROM", "RUN", "ENV", "VOLUME", "WORKDIR", "COPY", "USER", "ENTRYPOINT", "CMD"}
    assert names[:2] == ["ARG", "FROM"]
    assert re.fullmatch(r"BASE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", given_to("ARG")[0])
    assert given_to("FROM") == ["${BASE}"]
    declared = {given.partition("=")[0] for given in given_to("ARG")} | {"PATH"}
    used = set(re.findall(r"\$\{(\w+)\}", "".join(given for _, given in instructions())))
    assert used == declared


def test_what_is_copied_exists_is_not_ignored_and_is_all_that_a_wheel_needs(tmp_path: Path) -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == set(copied())
    for source in copied():
        target = tmp_path / "source" / source
        target.parent.mkdir(exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / source, target)
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path)]
    build.append(str(tmp_path / "source"))
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("qlora_cli/")}
    patterns = ("*.py", "*.typed", "*.jinja", "*.yaml", "*.json", "*.jsonl", "*.safetensors", "*LICENSE*")
    files = [path.relative_to(ROOT) for path in (ROOT / "qlora_cli").rglob("*") if "__pycache__" not in path.parts]
    needed = {str(file) for file in files if any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)}
    assert needed - packed == set()


def test_pip_installs_this_project_with_its_constraints_and_nothing_else() -> None:
    (words,) = (words for words in commands() if words[0] == "pip")
    assert words[:2] == ["pip", "install"]
    assert words[words.index("--constraint") + 1] in copied()
    requirements = [word for word in words[2:] if not word.startswith("--") and word != "constraints.txt"]
    assert requirements == [".[${EXTRAS}]"]
    (extras,) = (given.partition("=")[2] for given in given_to("ARG") if given.startswith("EXTRAS"))
    named = {*extras.split(","), *re.findall(r"EXTRAS=([\w,]+)", PAGE)[0].split(",")}
    assert named <= set(PROJECT["optional-dependencies"])


def test_each_pin_is_within_the_bounds_of_the_project() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {name: version for name, _, version in (line.partition("==") for line in lines if "==" in line)}
    requirements = [Requirement(text) for text in PROJECT["dependencies"]]
    for one in requirements:
        if one.name in pins:
            assert one.specifier.contains(pins[one.name]), one
    assert len({one.name for one in requirements} & set(pins)) > 10


def test_the_python_of_the_base_is_supported() -> None:
    assert "-ubuntu24.04" in given_to("ARG")[0]  # whose Python is 3.12
    assert "Programming Language :: Python :: 3.12" in PROJECT["classifiers"]
    installed = next(words for words in commands() if words[:2] == ["apt-get", "install"])
    assert {"python3", "python3-venv", "python3-dev", "gcc"} <= set(installed)


def test_it_does_not_run_as_root_and_any_user_may_write_to_the_volume() -> None:
    (user,) = given_to("USER")
    assert ["useradd", "--create-home", user] in commands()
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(at for at, name in enumerate(names) if name == "RUN")
    (volume,) = given_to("VOLUME")
    assert ["chmod", "1777", volume] in commands()
    caches = {name: value for name, value in environment().items() if name != "PATH"}
    assert all(value.startswith(f"{volume}/") for value in caches.values())
    assert {"HF_HOME", "QLORA_CACHE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"} <= set(caches)


def test_the_entry_point_is_that_of_the_project_and_answers() -> None:
    entry = shlex.split(given_to("ENTRYPOINT")[0].strip("[]"))
    assert entry == list(PROJECT["scripts"])
    module, _, function = PROJECT["scripts"][entry[0]].partition(":")
    call = f"import sys; from {module} import {function}; sys.argv = ['qlora', '--version']; {function}()"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qlora ")
    parse(typer.main.get_command(app), shlex.split(given_to("CMD")[0].strip("[]")))


@pytest.mark.parametrize("line", re.findall(r"^docker run .+$", PAGE.replace("\\\n", " "), re.MULTILINE))
def test_what_the_page_runs_in_a_container_parses(line: str) -> None:
    options, _, command = line.partition(" qlora ")
    parse(typer.main.get_command(app), shlex.split(command))
    volumes = {word.partition(":")[2] for word in re.findall(r"--volume \"?([^\s\"]+)", options)}
    assert volumes <= {*given_to("VOLUME"), given_to("WORKDIR")[-1]}


def test_the_page_has_commands() -> None:
    assert PAGE.count("docker run") >= 4
    assert "docker build --tag qlora ." in PAGE
