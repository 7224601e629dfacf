"""Helpers for tests that read rows of messages into conversations."""

from typing import Any

import pytest

from qlora_cli.data.rows.column_formats import recognise
from qlora_cli.data.rows.examples import Conversation, RowError
from qlora_cli.data.rows.row_reader import RowReader
from qlora_cli.settings.choices import LossOn
from qlora_cli.settings.models import DataSettings

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "f", "arguments": {"x": 1}}
AS_SERVED = {"type": "function", "function": CALL}
TEXT = {"type": "text", "text": "a"}


def reader_of(row: dict[str, Any], loss_on: LossOn = LossOn.COMPLETIONS) -> RowReader:
    layout = recognise(list(row), DataSettings(dataset=("rows.jsonl",)), "rows.jsonl")
    return RowReader(layout, loss_on, use_chat=True)


def read(row: dict[str, Any], loss_on: LossOn = LossOn.COMPLETIONS) -> Conversation:
    conversation = reader_of(row, loss_on).read(row)
    assert isinstance(conversation, Conversation)
    return conversation


def chat(*messages: dict[str, Any], loss_on: LossOn = LossOn.COMPLETIONS, **columns: Any) -> Conversation:
    return read({"messages": list(messages), **columns}, loss_on)


def problem(*messages: dict[str, Any], **columns: Any) -> RowError:
    with pytest.raises(RowError) as caught:
        chat(*messages, **columns)
    return caught.value
