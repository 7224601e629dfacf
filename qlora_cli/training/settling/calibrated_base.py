"""Train on a base that the run calibrates first, and from then on as on any quantized base in a directory."""

from qlora_cli.calibrating.own_base import make_base
from qlora_cli.errors import OutputDirectoryError
from qlora_cli.events import Reporter
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.runs.run_result import KeptLayers
from qlora_cli.settings.models import TrainSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import inferred_origin
from qlora_cli.training.calibrated_adapter import rows_to_calibrate_on
from qlora_cli.training.checks.memory_plan import decided
from qlora_cli.training.run_plan import settle_run

CALIBRATED = inferred_origin("--calibrate, the base that the run made")


def with_calibrated_base(
    resolved: Resolved[TrainSettings], reporter: Reporter, *, force: bool
) -> tuple[Resolved[TrainSettings], KeptLayers | None]:
    """Return the settings of a run on its own base, which is made first unless it is there.

    With a memory budget, the layers that it keeps unquantized are chosen first, and returned, too; not for a run that
    is resumed.

    Raises:
        QloraError: of the type of the problem; what can be found before calibrating is.
    """
    settings = resolved.settings
    directory = RunDirectory(settings.output.directory)
    if directory.is_run and not directory.base.is_dir():
        raise OutputDirectoryError(
            f"the run in {directory.path} is to be resumed, and its base, {directory.base}, is missing",
            hint="Put it back, or choose another --output.",
        )
    kept = None
    if not directory.is_run:
        settled = settle_run(resolved, reporter, force=force)
        rows = rows_to_calibrate_on(settings, settled.load_plan, settled.rows.train)
        kept = settled.kept
        make_base(settled.load_plan, settings.lora, rows, directory.base, reporter)
    return decided(resolved, {"model.name": str(directory.base), "model.revision": None}, CALIBRATED), kept
