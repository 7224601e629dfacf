#!/usr/bin/env python3
"""Run the part of the test suite that matters with the lowest versions that pyproject.toml allows.

Makes a virtual environment with exactly the lower bound of every dependency, so that each bound is a version that
was tried. Two things are not lowered. torch stays at the version of constraints.txt: on the package index the lowest
release exists only as a build with CUDA, which takes gigabytes (`--torch-too` lowers it nevertheless). And the tools
of the tests have the versions of constraints.txt, since they are not part of the product.

    scripts/test_lowest.py                         # private names, a prediction, a training, a resume, a merge
    scripts/test_lowest.py --venv DIR              # in an environment that is used again
    scripts/test_lowest.py tests/unit/adapters     # other tests
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TEST_TOOLS = ("pytest", "pytest-xdist", "hypothesis")
TESTS = (
    "tests/contract/test_seams.py",
    "tests/unit/quantization/test_blocks.py",
    "tests/integration/adapters/test_checkpointing.py",
    "tests/integration/memory/test_memory_before_training.py",
    "tests/integration/training/test_reference_step.py",
    "tests/integration/training/test_resume.py::test_every_way_to_feed_and_to_adapt_resumes_exactly[packed]",
    "tests/integration/merging/test_merge_runs.py"
    "::test_the_merged_model_is_the_one_that_was_trained[LoRA and stretched positions]",
)


def main() -> int:
    """Install and test; return the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="given to pytest instead of the chosen tests")
    parser.add_argument("--venv", type=Path, help="where the environment lies (default: a new, temporary one)")
    parser.add_argument("--torch-too", action="store_true", help="lower torch as well")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlora-lowest-") as scratch:
        python = install(asked.venv or Path(scratch) / "venv", torch_too=asked.torch_too)
        start = time.monotonic()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        # Warnings are not errors here: an old release may use what a newer one of its own dependencies deprecates.
        options = ["-q", "-p", "no:cacheprovider", "-W", "default"]
        command = [python, "-m", "pytest", *options, *(asked.tests or TESTS)]
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    print(f"tested in {time.monotonic() - start:.0f} s", flush=True)
    return code


def install(venv: Path, *, torch_too: bool) -> Path:
    """Make an environment with the lowest versions at `venv`; return its interpreter."""
    start = time.monotonic()
    packages = [*lowest_versions(torch_too=torch_too), *constrained(TEST_TOOLS)]
    print("\n".join(packages), flush=True)
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    print(f"installed in {time.monotonic() - start:.0f} s", flush=True)
    return python


def lowest_versions(*, torch_too: bool) -> list[str]:
    """Return `name==lower bound` of every dependency in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [Requirement(text) for text in project["dependencies"]]
    lowered = [one for one in requirements if torch_too or one.name != "torch"]
    return [*map(_lowest, lowered), *([] if torch_too else constrained(["torch"]))]


def _lowest(requirement: Requirement) -> str:
    (bound,) = (one.version for one in requirement.specifier if one.operator == ">=")
    return f"{requirement.name}=={bound}"


def constrained(names: Sequence[str]) -> list[str]:
    """Return the lines of constraints.txt for `names`."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = {line.partition("==")[0]: line for line in lines if "==" in line}
    return [requirements[name] for name in names]


if __name__ == "__main__":
    sys.exit(main())
