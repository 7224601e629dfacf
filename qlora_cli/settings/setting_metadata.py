"""What is known of a setting besides its type, default and help: marks on its field.

    rank: Annotated[int, Metadata(flag="--rank", affects_memory=True)] = Field(default=16, ge=1, description="…")

The flags of every command, the settings that a prediction goes by, what may change when a run resumes, and the
reference are derived from them. So a setting is added in one place: its field.
"""

from dataclasses import dataclass
from enum import StrEnum

from pydantic.fields import FieldInfo


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


# The commands that read weights, and those that read a tokenizer.
LOADERS = (Command.LOAD, Command.TRAIN, Command.GENERATE, Command.CHAT, Command.EVALUATE)
TOKENIZERS = (*LOADERS, Command.INSPECT_DATA)
# The commands that find a base, and those that read weights of any kind.
BASES = (*TOKENIZERS, Command.MERGE)
READERS = (*LOADERS, Command.MERGE)


class OnResume(StrEnum):
    """Whether a resumed run may have another value than before.

    FREE: it changes neither the adapter nor what is said of it. BATCH: as long as a step has as many rows. LENGTH: as
    long as the steps so far had the same learning rates. SAME: never.
    """

    FREE = "free"
    BATCH = "batch"
    LENGTH = "length"
    SAME = "same"


@dataclass(frozen=True, kw_only=True)
class EffectiveWith:
    """The values of another setting of the same section that give a setting its effect; `why` explains it.

    Of a setting that takes several values, one of them must be among these.
    """

    key: str
    values: tuple[StrEnum, ...]
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Metadata:
    """What is known of one setting.

    Attributes:
        flag: The flag that sets it; None if only `--set` and a settings file do.
        off_flag: Of a switch, the flag that turns it off, where that is not `--no-` and the flag's name.
        commands: The commands that take the flag, besides `inspect-memory`, which takes that of every setting that
            affects memory. A command is left out if the setting means nothing to it.
        argument_of: The commands that take it as an argument, without the flag.
        metavar: What the flag takes, where neither the choices nor the type say it.
        is_repeatable: Whether the flag may be given several times.
        affects_memory: Whether the memory that training takes depends on it.
        on_resume: Whether it may change when a run resumes.
        is_inherited: Whether a base is loaded as the run that is named was trained, unless another value is given.
        effective_with: The other setting that it needs to have an effect.
        is_forbidden_in_files: Whether a settings file must not enable it, because it runs code that comes with a model.
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
    effective_with: EffectiveWith | None = None
    is_forbidden_in_files: bool = False

    def is_taken_by(self, command: Command) -> bool:
        """Whether `command` has the flag, or takes it as an argument."""
        by_flag = command in self.commands or (command is Command.INSPECT_MEMORY and self.affects_memory)
        return command in self.argument_of or (self.flag is not None and by_flag)


def field_metadata(field: FieldInfo) -> Metadata:
    """Return the marks of a field; the defaults if it has none."""
    return next((mark for mark in field.metadata if isinstance(mark, Metadata)), Metadata())
