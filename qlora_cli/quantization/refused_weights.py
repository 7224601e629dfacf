"""Record which weights could not be quantized while a model was read, each with its error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qlora_cli.errors import ModelError

OTHER_VERSION = "Are config.json and the weights of the same version? Download the whole model again."


@dataclass
class RefusedWeights:
    """The `errors` that quantizing raised, by the full name of the weight.

    transformers continues after a failed conversion, and keeps only its text. Copying returns the same object:
    transformers copies the config that holds it.
    """

    errors: dict[str, ModelError] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> "RefusedWeights":
        return self

    @contextmanager
    def recording(self, name: str) -> Iterator[None]:
        """Record an error that is raised for the weight `name`, and re-raise it."""
        try:
            yield
        except ModelError as error:
            self.errors[name] = error
            raise
