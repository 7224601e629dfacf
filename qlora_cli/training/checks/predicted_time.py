"""Predict the time of a run's optimizer steps, on a GPU or on this machine's CPU, once its rates were measured."""

from collections.abc import Callable

from qlora_cli.data.feeding.micro_batches import micro_batch_tokens
from qlora_cli.data.feeding.prepare import TrainingData
from qlora_cli.errors import QloraError
from qlora_cli.loading.load_plan import LoadPlan
from qlora_cli.memory.costs.step_time import rates_on
from qlora_cli.memory.estimator import Estimator
from qlora_cli.memory.gpus import this_cpu
from qlora_cli.memory.host_run import on_cpu
from qlora_cli.memory.prediction import StepTime
from qlora_cli.memory.run_batches import with_tokens
from qlora_cli.runs.run_result import PredictedTime
from qlora_cli.settings.models import EstimateSettings, TrainSettings
from qlora_cli.training.batches import MOST_AVERAGED
from qlora_cli.training.callbacks.step_timer import Forecast
from qlora_cli.training.checks.predicted_memory import Outlook, as_asked, contained, estimator_of


def predict_time(
    settings: TrainSettings, load_plan: LoadPlan, data: TrainingData, outlook: Outlook | None, *, num_steps: int
) -> Forecast | None:
    """Return the predicted time of a step with the run's own micro-batches, by one of their mean length.

    None if the speed of the device is not known, for a stream, whose rows are not known, and if it can't be predicted.
    """
    if data.train.stream is not None:
        return None
    asked, time_of = _predictor(settings, load_plan, data.longest_tokens, outlook)
    num_averaged = min(num_steps, MOST_AVERAGED)
    sizes = micro_batch_tokens(
        data.train.lengths,
        settings.training,
        num_steps=num_averaged,
        is_packed=settings.data.packing,
        padded_lengths=data.train.padded_lengths,
    )
    mean_tokens = round(sum(tokens * number for tokens, number in sizes.items()) / sizes.total())
    try:
        time = time_of(with_tokens(asked, mean_tokens))
    except QloraError:  # its memory can't be predicted either, which was said
        return None
    return None if time is None else _of_step(time, sizes.total() / num_averaged)


def _predictor(
    settings: TrainSettings, load_plan: LoadPlan, longest_tokens: int, outlook: Outlook | None
) -> tuple[EstimateSettings, Callable[[EstimateSettings], StepTime | None]]:
    """Return the settings to predict by, and what predicts the time of others."""
    if outlook is not None:
        return outlook.asked, lambda run: outlook.estimate_of(run, outlook.gpu).time
    asked = as_asked(settings, load_plan, longest_tokens)
    if load_plan.device.type != "cpu" or rates_on(this_cpu()) is None:
        return asked, lambda _: None
    predict = contained(lambda run, _: cpu_step_time(estimator_of(settings, load_plan), run))
    return asked, lambda run: predict(run, this_cpu())


def _of_step(time: StepTime, num_micro_batches: float) -> Forecast:
    seconds = num_micro_batches * time.micro_batch_seconds + time.update_seconds
    predicted = PredictedTime(
        step_seconds=seconds,
        step_seconds_low=seconds * time.step_seconds_low / time.step_seconds,
        step_seconds_high=seconds * time.step_seconds_high / time.step_seconds,
        rates=time.rates,
        learnt_ratio=time.learnt_ratio,
        learnt_runs=time.learnt_runs,
    )
    return Forecast(predicted=predicted, key=time.key)


def cpu_step_time(estimator: Estimator, settings: EstimateSettings) -> StepTime | None:
    """Return the time of a step on this CPU; None if its rates were not measured, or with another dtype.

    Raises:
        ModelError: the model can't be run with these settings.
        HardwareError: the CPU can't compute with them.
    """
    return estimator.step_time(on_cpu(settings), this_cpu())
