"""What `--learning-rates` takes: two or more rates, separated by commas."""

from pydantic import ValidationError

from qlora_cli.errors import Problem, SettingsError
from qlora_cli.settings.models import TrainingSettings, value_adapter

FLAG = "--learning-rates"
EXAMPLE = "For example: --learning-rates 1e-4,2e-4,4e-4"
MOST_RATES = 32


def read_learning_rates(text: str) -> tuple[float, ...]:
    """Return the distinct rates in `text`, in ascending order.

    Raises:
        SettingsError: one is no learning rate, or there are too few or too many.
    """
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if _rate(word) is None]
    if wrong:
        raise _error(f"{wrong[0]!r} is no learning rate above 0 and below 1")
    rates = sorted({rate for word in words if (rate := _rate(word)) is not None})
    if not 2 <= len(rates) <= MOST_RATES:
        raise _error(f"2 to {MOST_RATES} different rates are compared, got {len(rates)}")
    return tuple(rates)


def _rate(word: str) -> float | None:
    try:
        rate: float = value_adapter(TrainingSettings, "learning_rate").validate_python(word)
    except ValidationError:
        return None
    return rate


def _error(message: str) -> SettingsError:
    return SettingsError([Problem(where=FLAG, message=message, hint=EXAMPLE)])
