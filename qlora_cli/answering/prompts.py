"""Encode messages with a generation prompt by the chat template, or as plain text without one."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.tokenizing.template_rendering import TemplateRefusalError, render
from qlora_cli.tokenizing.tokenizer_errors import explain_tokenizer_errors

Message = dict[str, str]

OTHER_TEMPLATE = "Give a template that does (--chat-template chatml, or a file)."


def messages_of(prompt: str, system: str | None = None) -> list[Message]:
    """Return a conversation that begins with `prompt`."""
    return [*system_messages(system), {"role": "user", "content": prompt}]


def system_messages(system: str | None) -> list[Message]:
    """Return the system prompt as a list of messages, empty without one."""
    return [] if system is None else [{"role": "system", "content": system}]


def encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Return the ids of `messages` and the generation prompt; without a chat template, of the single message as it is.

    Raises:
        ModelError: the chat template refuses the messages.
    """
    if tokenizer.chat_template is None:
        (message,) = messages
        return _encode_plain(tokenizer, message["content"])
    with explain_tokenizer_errors(tokenizer.name_or_path):
        ids: list[int] = tokenizer(written(tokenizer, messages), add_special_tokens=False)["input_ids"]
    return ids


def written(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Render `messages` with the chat template and the generation prompt.

    Raises:
        ModelError: it refuses them, or does not end.
    """
    try:
        return render(tokenizer, messages, add_generation_prompt=True)
    except TemplateRefusalError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ModelError(
            f"the chat template refuses these messages ({roles}): {error}", hint=OTHER_TEMPLATE
        ) from error


def check_system(tokenizer: PreTrainedTokenizerBase, system: str) -> None:
    """Check that a system prompt reaches the model.

    Raises:
        ModelError: there is no chat template, or it does not write the system prompt.
    """
    if tokenizer.chat_template is None:
        raise ModelError(
            "a system prompt can't be used: the tokenizer has no chat template, so a prompt is continued as it is",
            hint="Put it into the prompt, or give a template (--chat-template chatml, or a file).",
            setting="generate.system",
        )
    text = system.strip()
    without = written(tokenizer, messages_of("Hello"))
    if written(tokenizer, messages_of("Hello", system)).count(text) <= without.count(text):
        raise ModelError(
            f"the chat template does not write a system prompt: {text[:40]!r} is not in the text",
            hint=f"Put it into the prompt. {OTHER_TEMPLATE}",
            setting="generate.system",
        )


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    with explain_tokenizer_errors(tokenizer.name_or_path):
        ids: list[int] = tokenizer(text)["input_ids"]
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if len(ids) > 1 and ids[-1] == end and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]  # some tokenizers append EOS to every text
    if begin is not None and ids[:2] == [begin, begin]:  # the text itself begins with one
        ids = ids[1:]
    return ids
