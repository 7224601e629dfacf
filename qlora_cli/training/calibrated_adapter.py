"""What the adapter of a run is initialized from, if it is calibrated on the rows to train."""

from qlora_cli.calibrating.calibration_rows import CalibrationRows, chosen_rows, tokens_needed
from qlora_cli.calibrating.initial_adapter import calibrated_residuals
from qlora_cli.data.feeding.prepare import PreparedData
from qlora_cli.events import Reporter
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.quantization.residuals import QuantizationResiduals
from qlora_cli.settings.choices import LoraInit
from qlora_cli.settings.models import TrainSettings


def rows_to_calibrate_on(settings: TrainSettings, load_plan: LoadPlan, train: PreparedData) -> CalibrationRows:
    """Return the rows of a run that its base or its adapter is calibrated on."""
    num_tokens = settings.training.calibration_tokens or tokens_needed(load_plan)
    return chosen_rows(train, settings.data.dataset, num_tokens)


def residuals_of_run(
    settings: TrainSettings, load_plan: LoadPlan, train: PreparedData, reporter: Reporter, *, begins: bool
) -> QuantizationResiduals | None:
    """Return what the adapter is initialized from, nothing if no run `begins`; None if it is not calibrated.

    Raises:
        ModelError: it can't be calibrated.
    """
    if settings.lora.init_lora_weights != LoraInit.CALIBRATED:
        return None
    if not begins:
        return QuantizationResiduals(ranks={})
    rows = rows_to_calibrate_on(settings, load_plan, train)
    return calibrated_residuals(load_plan, settings.lora, rows, reporter)
