"""Read the data set of `qlora inspect-memory --dataset`: the micro-batches that training on it would make.

The rows are read, tokenized, held out, packed and ordered by the functions that `qlora train` calls.
"""

from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING

from qlora_cli.cache import code_digests, digest_of
from qlora_cli.data.opening.first_rows import first_rows_errors, on_this_disk
from qlora_cli.data.opening.name_checks import data_problems
from qlora_cli.errors import ModelError, ModelNotFoundError, Problem
from qlora_cli.events import PhaseStarted, Reporter
from qlora_cli.memory.catalogue import find_in_catalogue
from qlora_cli.memory.model_facts import find_model_facts
from qlora_cli.memory.prediction import DataSummary
from qlora_cli.memory.request import MemoryRequest
from qlora_cli.memory.run_batches import FedRows, ReadRows, RunBatches
from qlora_cli.model_files.given_model import looks_local
from qlora_cli.settings.models import DataSettings, InspectMemorySettings, ModelSettings, TrainingSettings
from qlora_cli.settings.resolve import Resolved
from qlora_cli.settings.settle import settle, with_values

if TYPE_CHECKING:
    from qlora_cli.data.feeding.prepare import TrainingData

CODE = ("data", "training")  # which decides what is fed, besides what every prediction depends on
WITHOUT_DATA = "Or leave --dataset out, and give --rows N and --mean-tokens T."


def dataset_problems(resolved: Resolved[InspectMemorySettings]) -> Iterator[Problem]:
    """Yield the problems with the data sets that can be seen before a tokenizer is loaded."""
    settings = resolved.settings
    if settings.data.streaming:
        message = "the rows of a stream are not known before they are fed"
        hint = "Leave it out to read all rows, or leave --dataset out."
        yield Problem(where=resolved.where_of("data.streaming"), message=message, hint=hint)
        return
    if problems := data_problems(resolved, settings.data):
        yield from problems
        return
    for path, error in first_rows_errors(settings.data, settings.training.seed, include=on_this_disk):
        yield resolved.problem(path, error)


def with_rows(request: MemoryRequest, reporter: Reporter) -> MemoryRequest:
    """Return the request with the rows of its data set; imports torch.

    Raises:
        ModelNotFoundError: the model, or its tokenizer, is not here.
        ModelError: it has no tokenizer that can be used.
        DataError: `train` would refuse the data.
    """
    from qlora_cli.data.feeding.prepare import prepare_data
    from qlora_cli.data.tokenizing.encode import TextTokenizer
    from qlora_cli.tokenizing.positions import LENGTH, limit_length, note_length
    from qlora_cli.tokenizing.text_interface import load_text_interface

    asked = request.asked
    facts = find_model_facts(asked, reporter)
    length = asked.settings.data.max_length if asked.is_given(LENGTH) else None
    try:
        text = load_text_interface(_with_hub_id(asked.settings.model), reporter, max_length=length)
    except (ModelNotFoundError, ModelError) as error:
        error.message = f"--dataset needs the model's tokenizer: {error.message}"
        error.hint = f"{error.hint or ''} {WITHOUT_DATA}".strip()
        raise
    settled = settle(asked, [*limit_length(asked.settings, text.num_positions), *facts.settings])
    note_length(settled, reporter)
    data, training = settled.settings.data, settled.settings.training
    reporter.report(PhaseStarted(title=f"Reading {', '.join(data.dataset or ())}"))
    tokenizer = TextTokenizer(tokenizer=text.tokenizer.tokenizer, end_ids=text.tokenizer.end_ids, reporter=reporter)
    prepared = prepare_data(data, tokenizer, seed=training.seed)
    return replace(request, rows=_read_rows(prepared, data, training))


def _with_hub_id(model: ModelSettings) -> ModelSettings:
    """Return the settings with the repository of a model of the catalogue instead of its short name."""
    known = None if looks_local(model.name) else find_in_catalogue(model.name)
    return model if known is None else with_values(model, name=known.hub_id)


def _read_rows(prepared: "TrainingData", data: DataSettings, training: TrainingSettings) -> ReadRows:
    from qlora_cli.training.batches import average_step

    lengths = prepared.train.lengths
    order = (training.seed, training.sampling, training.longest_first, prepared.longest_tokens)
    return ReadRows(
        digest=digest_of(
            [sha256(lengths.tobytes()).hexdigest(), repr(order), repr(prepared.train.report), *code_digests(CODE)]
        ),
        num_rows=prepared.train.report.rows_trained,
        longest_tokens=prepared.longest_tokens,
        average_step=lambda planned: average_step(lengths, planned),
        feed=lambda planned: _fed(prepared, planned, is_packed=data.packing),
    )


def _fed(prepared: "TrainingData", training: TrainingSettings, *, is_packed: bool) -> FedRows:
    from qlora_cli.data.feeding.micro_batches import micro_batch_tokens, padding_of_epoch

    train, evaluation = prepared.train, prepared.evaluation
    report, num_steps = train.report, training.num_steps(len(train.lengths))
    padded = train.padded_lengths
    sizes = micro_batch_tokens(
        train.lengths, training, num_steps=num_steps, is_packed=is_packed, padded_lengths=padded
    )
    summary = DataSummary(
        name=report.name,
        num_train_rows=report.rows_trained,
        num_packed_rows=report.packed_rows,
        num_eval_rows=None if evaluation is None else evaluation.report.rows_trained,
        num_train_tokens=report.tokens,
        longest_row_tokens=report.longest_row_tokens,
        num_truncated_rows=report.truncated_rows,
        padding_share=padding_of_epoch(train.lengths, training, is_packed=is_packed, padded_lengths=padded),
        num_micro_batches=sizes.total(),
    )
    return FedRows(batches=RunBatches(num_steps=num_steps, by_tokens=tuple(sorted(sizes.items()))), summary=summary)
