"""Load the tokenizer of a model and give it a pad token that does not stand for the end."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_cli.errors import ModelError
from qlora_cli.loading.source import ModelSource

# Tokens that tokenizers carry for padding or hold in reserve, best first.
PAD_TOKENS = (
    "<|finetune_right_pad_id|>",
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
    "<unk>",
)


def load_tokenizer(source: ModelSource) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Return the tokenizer, padding on the right, and notes on what was chosen for it.

    Raises:
        ModelError: there is no tokenizer, it has no end-of-sequence token, or it can't give the position
            of its tokens in the text, which the loss mask is built from.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source.name} has no tokenizer that can be loaded: {error}",
            hint="Save one beside the weights with tokenizer.save_pretrained().",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"the tokenizer of {source.name} ({type(tokenizer).__name__}) gives no character offsets",
            hint="Convert it to a tokenizer.json (a fast tokenizer).",
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {source.name} has no eos token, so the model could never learn to stop",
            hint="Set eos_token in tokenizer_config.json.",
        )
    tokenizer.padding_side = "right"
    return tokenizer, _choose_pad(tokenizer)


def _choose_pad(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    eos = tokenizer.eos_token
    if tokenizer.pad_token is not None and tokenizer.pad_token != eos:
        return []
    vocabulary = tokenizer.get_vocab()
    for token in PAD_TOKENS:
        if token in vocabulary and token != eos:
            tokenizer.pad_token = token
            return [f"the tokenizer pads with its end token or none at all; padding with {token} instead"]
    # Harmless for training: padding is masked by position, so a real end token is still trained.
    tokenizer.pad_token = eos
    return [f"the tokenizer has no token to spare for padding; padding with {eos}, masked by position"]
