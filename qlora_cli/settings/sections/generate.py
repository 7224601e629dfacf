"""Settings of `qlora generate` and `qlora chat`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import Command, Metadata
from qlora_cli.settings.values import Prompts, PromptText

GENERATE = (Command.GENERATE,)
ASKING = (Command.GENERATE, Command.CHAT)


class AnswerSettings(Section):
    """Settings of `qlora generate` and `qlora chat`."""

    prompts: Annotated[Prompts | None, Metadata(flag="--prompt", commands=GENERATE, is_repeatable=True)] = Field(
        default=None, description="What to answer; may be given several times. - reads it from stdin."
    )
    system: Annotated[PromptText | None, Metadata(flag="--system", commands=ASKING)] = Field(
        default=None, description="System prompt, if the chat template writes one."
    )
    compare: Annotated[bool, Metadata(flag="--compare", commands=ASKING)] = Field(
        default=False, description="Answer as base, with the adapter, and (generate) as merged model if there is one."
    )
    merged: Annotated[Path | None, Metadata(flag="--merged", commands=GENERATE)] = Field(
        default=None, description="Merged model for --compare; by default that of the run, if any."
    )
    max_new_tokens: Annotated[int, Metadata(flag="--max-new-tokens", commands=ASKING)] = Field(
        default=256, ge=1, description="Longest answer, in tokens."
    )
    temperature: Annotated[float, Metadata(flag="--temperature", commands=ASKING)] = Field(
        default=0.0, ge=0, description="0: greedy decoding; above: sampling at this temperature."
    )
    top_p: Annotated[float | None, Metadata(flag="--top-p", commands=ASKING)] = Field(
        default=None, gt=0, le=1, description="Sample from the likeliest tokens with this total probability."
    )
    top_k: Annotated[int | None, Metadata(flag="--top-k", commands=ASKING)] = Field(
        default=None, ge=1, description="Sample from this many of the likeliest tokens."
    )
    seed: Annotated[int | None, Metadata(flag="--seed", commands=ASKING)] = Field(
        default=None, ge=0, lt=2**32, description="Seed for sampling; 0 if not given."
    )

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy."""
        return self.temperature == 0

    @property
    def drawn_seed(self) -> int | None:
        """The seed for sampling; None if decoding is greedy."""
        return None if self.is_greedy else self.seed or 0
