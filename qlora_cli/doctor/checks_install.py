"""Check the installation: Python, the versions of packages, and whether the libraries can be imported."""

import importlib
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version

from qlora_cli.doctor.findings import Outcome, Status, failed, ok, warning
from qlora_cli.doctor.isolation import attempt

DISTRIBUTION = "qlora-cli"
# The names that a run imports, because importing a lazy package alone proves little.
LIBRARIES = {
    "transformers": ("AutoModelForCausalLM", "AutoTokenizer", "BitsAndBytesConfig", "Trainer"),
    "datasets": ("load_dataset",),
    "accelerate": ("Accelerator",),
    "peft": ("LoraConfig", "get_peft_model"),
    "trl": ("SFTConfig", "SFTTrainer"),
}


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that qlora needs: the supported versions, and the installed one."""

    name: str
    required: str
    installed: str | None
    within_bounds: bool

    @property
    def problem(self) -> str:
        """The problem with the package."""
        return f"{self.name} {self.installed or 'is not installed'} (needs {self.required or 'any version'})"


def check_python() -> Outcome:
    """Compare the interpreter with the Python versions that the package supports."""
    from packaging.specifiers import SpecifierSet

    running = platform.python_version()
    try:
        required = metadata(DISTRIBUTION)["Requires-Python"] or ""
    except PackageNotFoundError:
        required = ""
    details = {
        "version": running,
        "required": required,
        "implementation": platform.python_implementation(),
        "system": platform.system(),
        "machine": platform.machine(),
    }
    if not SpecifierSet(required).contains(running, prereleases=True):
        return failed(
            f"{running}, but {required} is needed", "Make a virtual environment with a newer Python.", **details
        )
    if sys.maxsize < 2**32:
        return failed(f"{running} is a 32-bit build", "Install a 64-bit Python; PyTorch has no other.", **details)
    return ok(f"{running} on {platform.system()} {platform.machine()}", **details)


def check_packages() -> Outcome:
    """Compare the version of every package that qlora depends on with its bounds."""
    try:
        requirements = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return warning(
            "qlora-cli runs from a directory and is not installed, so the versions that it needs are unknown",
            "Install it: pip install -e . in its directory.",
        )
    return judge_packages([package for text in requirements if (package := _look_up(text))])


def judge_packages(packages: list[Package]) -> Outcome:
    """Return ok with all versions, or failed with every package that is missing or out of bounds."""
    details = [asdict(package) for package in packages]
    wrong = [package for package in packages if not package.within_bounds]
    if wrong:
        wanted = " ".join(f"'{package.name}{package.required}'" for package in wrong)
        return failed(
            "; ".join(package.problem for package in wrong), f"Run: pip install --upgrade {wanted}", packages=details
        )
    versions = ", ".join(f"{package.name} {package.installed}" for package in packages)
    return ok(f"all {len(packages)} within their bounds: {versions}", packages=details)


def _look_up(text: str) -> Package | None:
    """Return the package of a requirement; None if it belongs to an extra, or another system."""
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return None
    try:
        installed = version(requirement.name)
    except PackageNotFoundError:
        installed = None
    return Package(
        name=requirement.name,
        required=",".join(sorted(map(str, requirement.specifier), reverse=True)),  # the lower bound first
        installed=installed,
        within_bounds=installed is not None and requirement.specifier.contains(installed, prereleases=True),
    )


def check_libraries() -> Outcome:
    """Import from each library the names that a run needs."""
    start = time.perf_counter()
    outcomes = {name: attempt(_import_from, name, advice="") for name in LIBRARIES}
    seconds = time.perf_counter() - start
    broken = {name: outcome.finding for name, outcome in outcomes.items() if outcome.status != Status.OK}
    if broken:
        return failed(
            "; ".join(f"{name} can't be imported: {finding}" for name, finding in broken.items()),
            f"Run: pip install --force-reinstall {' '.join(broken)}",
            errors={name: outcomes[name].details["error"] for name in broken},
        )
    return ok(f"{', '.join(LIBRARIES)} can be imported ({seconds:.1f} s)", import_seconds=seconds)


def _import_from(name: str) -> Outcome:
    library = importlib.import_module(name)
    for part in LIBRARIES[name]:
        getattr(library, part)
    return ok("can be imported")
