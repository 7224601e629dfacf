"""How to answer, as it was asked for; what is wrong with that is told before torch is imported."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora_cli.errors import ModelError, Problem, QloraError
from qlora_cli.model_files.adapter_files import ADAPTER_CONFIG
from qlora_cli.model_files.source import check_model_name, looks_local
from qlora_cli.runs.directory import RunDirectory
from qlora_cli.settings.models import ModelSettings

TEMPERATURE_HINT = "Give --temperature above 0 too, such as 0.7, or leave it out."


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn at random by the seed.

    `top_p` draws from the likeliest tokens that have this probability together, `top_k` from so many.
    """

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


GREEDY = Sampling()


@dataclass(frozen=True, kw_only=True)
class AnswerRequest:
    """What is asked for besides the prompts. `merged` is a merged model to compare with, if one was named."""

    max_new_tokens: int
    sampling: Sampling = GREEDY
    system: str | None = None
    compare: bool = False
    merged: Path | None = None


def request_problems(request: AnswerRequest, prompts: Sequence[str] = ()) -> list[Problem]:
    """Return what is wrong with a request, each with the flag that asked for it."""
    texts = [("--prompt", prompt) for prompt in prompts]
    if request.system is not None:
        texts.append(("--system", request.system))
    problems = [problem for where, text in texts for problem in _about_text(where, text)]
    problems += _about_sampling(request.sampling)
    if request.max_new_tokens < 1:
        problems.append(Problem(where="--max-new-tokens", message=f"{request.max_new_tokens} is less than 1"))
    if request.merged is not None and not request.compare:
        problems.append(
            Problem(
                where="--merged",
                message="has no effect without --compare",
                hint=f"Add --compare, or ask the merged model alone: qlora generate {request.merged}",
            )
        )
    return problems


def check_merged(directory: Path) -> QloraError | None:
    """Return what is wrong with a merged model that was named, as far as that shows at once."""
    if not directory.is_dir() or not looks_local(str(directory)):
        return ModelError(f"--merged {directory}: no such directory", hint="Merge first: qlora merge RUN")
    if RunDirectory(directory).is_run or (directory / ADAPTER_CONFIG).is_file():
        return ModelError(
            f"--merged {directory} is an adapter or a run, not a merged model",
            hint="Name the directory that the merged model was written to.",
        )
    return check_model_name(ModelSettings(name=str(directory.absolute())))


def _about_text(where: str, text: str) -> Iterator[Problem]:
    if not text.strip():
        yield Problem(where=where, message="is empty", hint="Give some text, or - to read a prompt from stdin.")
    elif any("\ud800" <= character <= "\udfff" for character in text):  # Python's stand-ins for stray bytes
        yield Problem(where=where, message="is not UTF-8", hint="Check the encoding of your terminal or file.")


def _about_sampling(sampling: Sampling) -> Iterator[Problem]:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        yield Problem(where="--temperature", message=f"{sampling.temperature:g} is no temperature", hint="Use 0 to 2.")
        return
    for flag, value in (("--top-p", sampling.top_p), ("--top-k", sampling.top_k), ("--seed", sampling.seed)):
        if sampling.is_greedy and value is not None:
            yield Problem(where=flag, message="has no effect: nothing is drawn at random", hint=TEMPERATURE_HINT)
    if sampling.top_p is not None and not 0 < sampling.top_p <= 1:
        yield Problem(where="--top-p", message=f"{sampling.top_p:g} is no share above 0 and up to 1")
    if sampling.top_k is not None and sampling.top_k < 1:
        yield Problem(where="--top-k", message=f"{sampling.top_k} is less than 1")
    if sampling.seed is not None and not 0 <= sampling.seed < 2**32:
        yield Problem(where="--seed", message=f"{sampling.seed} is not from 0 to 2^32 - 1")
