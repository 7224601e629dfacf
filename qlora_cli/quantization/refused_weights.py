"""Weights that could not be quantized while a model was read, each with its error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from qlora_cli.errors import ModelError

OTHER_VERSION = "Are config.json and the weights of one version? Get the model anew as a whole."


@dataclass
class RefusedWeights:
    """The `errors` that quantizing raised, by the full name of the weight.

    transformers continues after an error of a conversion, and keeps only its text. Copies are the same object:
    transformers copies a config that it is given.
    """

    errors: dict[str, ModelError] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, object]) -> "RefusedWeights":
        return self

    @contextmanager
    def recording(self, name: str) -> Iterator[None]:
        """Record the error that is raised over the weight `name`, and pass it on."""
        try:
            yield
        except ModelError as error:
            self.errors[name] = error
            raise
