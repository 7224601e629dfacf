"""Metadata of a setting besides its type, default and help, attached to its field.

    rank: Annotated[int, Metadata(flag="--rank", affects_memory=True)] = Field(default=16, ge=1, description="…")

The flags of every command, the settings that a prediction depends on, what may change when a run resumes, and the
reference are derived from it. So a setting is added in one place: its field.
"""

from dataclasses import dataclass
from enum import StrEnum

from pydantic.fields import FieldInfo

from qlora_cli.settings.help_groups import HelpGroup


class Command(StrEnum):
    """A command that takes settings."""

    LOAD = "load"
    TRAIN = "train"
    INSPECT_MEMORY = "inspect-memory"
    INSPECT_DATA = "inspect-data"
    MERGE = "merge"
    GENERATE = "generate"
    CHAT = "chat"
    EVALUATE = "evaluate"


# The commands that read weights, those that read a tokenizer, and those that read training data or any.
LOADERS = (Command.LOAD, Command.TRAIN, Command.GENERATE, Command.CHAT, Command.EVALUATE)
TOKENIZERS = (*LOADERS, Command.INSPECT_DATA)
TRAINING_DATA = (Command.TRAIN, Command.INSPECT_DATA, Command.INSPECT_MEMORY)
DATA = (*TRAINING_DATA, Command.EVALUATE)
# The commands that look for a base, and those that read weights of any kind.
BASES = (*TOKENIZERS, Command.MERGE)
READERS = (*LOADERS, Command.MERGE)


class OnResume(StrEnum):
    """Whether a setting may change when a run resumes.

    FREE: yes, it affects neither the adapter nor its description. BATCH: if the number of rows in a step stays the
    same. LENGTH: if the learning rates of the steps so far stay the same. SAME: never.
    """

    FREE = "free"
    BATCH = "batch"
    LENGTH = "length"
    SAME = "same"


class Named(StrEnum):
    """What the value of a setting is the name of, for completion in a shell."""

    MODEL = "model"
    RUN = "run"
    CARD = "card"


@dataclass(frozen=True, kw_only=True)
class EffectiveWith:
    """The values of another setting in the same section without which a setting has no effect; `why` explains it.

    If the other setting takes several values, one of them must be among these.
    """

    key: str
    values: tuple[StrEnum, ...]
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """Metadata of one setting.

    Attributes:
        flag: The flag that sets it; None if only `--set` and a settings file do.
        off_flag: The flag that turns a switch off, if it is not `--no-` followed by the flag's name.
        commands: The commands that take the flag, besides `inspect-memory`, which takes the flag of every setting that
            affects memory. A command is left out if the setting means nothing to it.
        argument_of: The commands that take it as a positional argument instead.
        metavar: The placeholder of the value in help, if neither the choices nor the type determine it.
        is_repeatable: Whether the flag may be given several times.
        affects_memory: Whether the memory of training depends on it.
        on_resume: Whether it may change when a run resumes.
        is_inherited: Whether loading a run uses the value that the run was trained with, unless another is given.
        group: The group of its flag in help, if not that of its section.
        names: What its value names, if a shell can complete that.
        effective_with: The other setting that it needs to have an effect.
        is_forbidden_in_files: Whether a settings file must not enable it, because it runs code from the model.
    """

    flag: str | None = None
    off_flag: str | None = None
    commands: tuple[Command, ...] = (Command.TRAIN,)
    argument_of: tuple[Command, ...] = ()
    metavar: str | None = None
    is_repeatable: bool = False
    affects_memory: bool = False
    on_resume: OnResume = OnResume.SAME
    is_inherited: bool = False
    group: HelpGroup | None = None
    names: Named | None = None
    effective_with: EffectiveWith | None = None
    is_forbidden_in_files: bool = False

    def is_taken_by(self, command: Command) -> bool:
        """Return whether `command` takes it, as a flag or as an argument."""
        by_flag = command in self.commands or (command is Command.INSPECT_MEMORY and self.affects_memory)
        return command in self.argument_of or (self.flag is not None and by_flag)


def field_metadata(field: FieldInfo) -> Metadata:
    """Return the metadata of a field; the defaults if it has none."""
    return next((item for item in field.metadata if isinstance(item, Metadata)), Metadata())
