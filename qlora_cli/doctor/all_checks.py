"""Run all checks, each after those that it depends on, and summarize them."""

from qlora_cli.doctor import (
    checks_bitsandbytes,
    checks_hardware,
    checks_hub,
    checks_install,
    checks_platform,
    checks_speed,
)
from qlora_cli.doctor.findings import Check, Outcome, Report, Status, skipped
from qlora_cli.doctor.isolation import CheckFunction, Isolation
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.hardware.driver import INSTALL_TORCH

LIMIT_SECONDS = 180.0  # importing PyTorch from a slow disk, or compiling kernels for a new GPU, takes minutes
REINSTALL = "Reinstall qlora with the versions that it is tested with: pip install -c constraints.txt ."
REINSTALL_TORCH = f"Reinstall PyTorch: {INSTALL_TORCH}"
REINSTALL_BITSANDBYTES = "Reinstall it: pip install --force-reinstall --no-deps bitsandbytes"
USE_CPU = "Restart, install a PyTorch that supports this GPU, or train without it: --device cpu"
REPORT_IT = "Run it again; if it stays so, report it with the output of --json."


def diagnose(reporter: Reporter, *, measures: bool = False) -> Report:
    """Return the results of all checks; their exceptions are results, too.

    `measures`: the speed of the device is measured and stored, too.
    """
    with Isolation() as isolation:
        examination = Examination(isolation, reporter)
        _examine_installation(examination)
        _examine_hardware(examination, measures=measures)
        _examine_surroundings(examination)
    return examination.report()


class Examination:
    """Runs checks and collects their results."""

    def __init__(self, isolation: Isolation, reporter: Reporter) -> None:
        self._isolation = isolation
        self._reporter = reporter
        self._checks: dict[str, Check] = {}
        self._vital: set[str] = set()

    def check(
        self,
        name: str,
        function: CheckFunction,
        *arguments: object,
        advice: str,
        needs: tuple[str, ...] = (),
        vital: bool = True,
    ) -> Check:
        """Run a check; `advice` is for a crash. If a check that it `needs` has failed, it is skipped.

        Training does not work if a `vital` check has failed.
        """
        self._reporter.report(PhaseStarted(title=f"Checking {name}"))
        missing = [need for need in needs if self._checks[need].status in {Status.FAILED, Status.SKIPPED}]
        if missing:
            outcome = skipped(f"needs {missing[0]}", f"See {missing[0]}.")
        else:
            outcome = self._isolation.run(function, *arguments, advice=advice, limit_seconds=LIMIT_SECONDS)
        check = _named(name, outcome)
        self._checks[name] = check
        if vital:
            self._vital.add(name)
        return check

    def report(self) -> Report:
        """Return all results with the verdict."""
        can_train = not any(self._checks[name].status == Status.FAILED for name in self._vital)
        return Report(can_train=can_train, checks=tuple(self._checks.values()))


def _named(name: str, outcome: Outcome) -> Check:
    return Check(
        name=name,
        status=outcome.status,
        finding=outcome.finding,
        advice=outcome.advice,
        details=outcome.details,
    )


def _examine_installation(examination: Examination) -> None:
    examination.check("python", checks_install.check_python, advice=REINSTALL)
    examination.check("packages", checks_install.check_packages, advice=REINSTALL)
    examination.check("torch", checks_hardware.check_torch, advice=REINSTALL_TORCH)
    examination.check("platform", checks_platform.check_platform, advice=REPORT_IT, needs=("torch",), vital=False)
    # Before the libraries, because some of them import it.
    examination.check(
        "bitsandbytes", checks_bitsandbytes.check_import, advice=REINSTALL_BITSANDBYTES, needs=("torch",)
    )
    examination.check("libraries", checks_install.check_libraries, advice=REINSTALL, needs=("torch",))


def _examine_hardware(examination: Examination, *, measures: bool) -> None:
    examination.check("driver", checks_hardware.check_driver, advice=REPORT_IT, vital=False)
    examination.check("cuda", checks_hardware.check_cuda, advice=REINSTALL_TORCH, needs=("torch",))
    gpu = examination.check("gpu", checks_hardware.check_gpu, advice=USE_CPU, needs=("torch",))
    gpus = gpu.details.get("gpus")
    num_gpus = len(gpus) if isinstance(gpus, list) else 0
    # By default a run uses the GPU, so the CPU matters only if there is none.
    devices = [("cpu", num_gpus == 0), *((f"cuda:{index}", True) for index in range(num_gpus))]
    for device, vital in devices:
        examination.check(
            _check_of(device),
            checks_bitsandbytes.check_device,
            device,
            advice=REINSTALL_BITSANDBYTES,
            needs=("bitsandbytes",),
            vital=vital,
        )
    examination.check("attention", checks_hardware.check_attention, advice=REINSTALL_TORCH, needs=("bitsandbytes",))
    examination.check("kernels", checks_platform.check_kernels, advice=REPORT_IT, needs=("torch",), vital=False)
    if measures:
        used = next(device for device, vital in devices if vital)
        needs = ("libraries", _check_of(used))
        examination.check("speed", checks_speed.check_speed, used, advice=REPORT_IT, needs=needs, vital=False)


def _check_of(device: str) -> str:
    return f"bitsandbytes_{device.replace(':', '_')}"


def _examine_surroundings(examination: Examination) -> None:
    hub = examination.check("hub", checks_hub.check_hub, advice=REPORT_IT, vital=False)
    reachable = hub.status == Status.OK
    examination.check("token", checks_hub.check_token, reachable, advice=checks_hub.LOG_IN, vital=False)
    examination.check("disk", checks_hub.check_disk, advice=REPORT_IT, vital=False)
