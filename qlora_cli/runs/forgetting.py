"""What a run forgot: the loss of its base and of its result on general text. Plain values."""

from dataclasses import dataclass

from qlora_cli.units import Whole, counted


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """The loss on a text that the run did not train on, in nats a token.

    Attributes:
        text: The file, or `built in`.
        fingerprint: A digest of the tokens, equal for runs whose figures can be compared.
        num_tokens: The tokens that were predicted.
        base_loss: The mean loss with the adapter off.
        loss: The mean loss with it.
    """

    text: str
    fingerprint: str
    num_tokens: Whole
    base_loss: float
    loss: float

    @property
    def change(self) -> float:
        """What training added to the loss: above zero, something was forgotten."""
        return self.loss - self.base_loss

    @property
    def sentence(self) -> str:
        """The figures in words."""
        of = f"{counted(self.num_tokens, 'token')}, {self.text}"
        return f"loss {self.base_loss:.4f} before, {self.loss:.4f} after ({self.change:+.4f}; {of})"
