"""Check how much is known of this platform, and the optional packages with kernels."""

import importlib
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

from qlora_cli.doctor.findings import Outcome, Status, failed, ok, warning
from qlora_cli.doctor.isolation import attempt
from qlora_cli.platforms import Backend, Platform, Support, find_platform

# Packages that a setting uses where they are installed: the module, and the setting.
KERNEL_PACKAGES = {
    "flash-attn": ("flash_attn", "--attention flash_attention_2"),
    "flash-attn-3": ("flash_attn_interface", "--attention flash_attention_3"),
    "liger-kernel": ("liger_kernel", "training.use_liger_kernel"),
}


@dataclass(frozen=True, kw_only=True)
class KernelPackage:
    """An optional package: its version, None if it is not installed, and why it can't be imported."""

    name: str
    version: str
    used_by: str
    error: str | None


def check_platform() -> Outcome:
    """Name the platform, and say how much is known of it."""
    return judge_platform(find_platform(sys.platform, platform.release(), _backend()))


def judge_platform(found: Platform) -> Outcome:
    """Return ok for a tested or intended platform, a warning for another, failed for one that does not run."""
    details = {"platform": found.name, "support": found.support.value, "computes_on": found.computes_on}
    finding = f"{found.name}, {found.support}: qlora computes on {found.computes_on}"
    if found.support in (Support.TESTED, Support.INTENDED):
        return ok(finding, **details)
    judged = warning if found.support == Support.UNTESTED else failed
    return judged(f"{finding}; {found.note}", found.advice or "", **details)


def _backend() -> Backend:
    import torch

    if torch.cuda.is_available():
        return "rocm" if torch.version.hip else "cuda"
    return "xpu" if torch.xpu.is_available() else "cpu"


def check_kernels() -> Outcome:
    """Import the optional packages with kernels that are installed."""
    return judge_kernels([package for name in KERNEL_PACKAGES if (package := _look_up(name))])


def judge_kernels(packages: list[KernelPackage]) -> Outcome:
    """Return ok with the packages that are installed, or a warning with those that can't be imported."""
    details = [asdict(package) for package in packages]
    broken = [package for package in packages if package.error is not None]
    if broken:
        finding = "; ".join(f"{one.name} {one.version} can't be imported: {one.error}" for one in broken)
        names = " ".join(one.name for one in broken)
        advice = f"Rebuild {names} for this PyTorch, or leave {', '.join(one.used_by for one in broken)} out."
        return warning(finding, advice, packages=details)
    absent = [name for name in KERNEL_PACKAGES if name not in {package.name for package in packages}]
    parts = [f"{one.name} {one.version} ({one.used_by})" for one in packages]
    if absent:
        parts.append(f"not installed, and only needed where a setting names it: {', '.join(absent)}")
    return ok("; ".join(parts), packages=details)


def _look_up(name: str) -> KernelPackage | None:
    module, used_by = KERNEL_PACKAGES[name]
    try:
        installed = version(name)
    except PackageNotFoundError:
        return None
    outcome = attempt(_import, module, advice="")
    error = None if outcome.status == Status.OK else outcome.finding
    return KernelPackage(name=name, version=installed, used_by=used_by, error=error)


def _import(module: str) -> Outcome:
    importlib.import_module(module)
    return ok("can be imported")
