"""Chat templates with the features of those in use, written for tests, and those that TRL ships."""

from functools import cache
from importlib.resources import files
from pathlib import Path

from tokenizers import AddedToken

from qlora_cli.data.rendering.template import TAG
from qlora_cli.data.tokenizing.encode import TextTokenizer
from tests.support.models.chat_tokenizers import make_tokenizer

OWN = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.jinja"))}
# Those ending in `_training` are TRL's own changes to the same ones.
SHIPPED = {
    path.name.removesuffix(".jinja"): path
    for path in files("trl").joinpath("chat_templates").iterdir()
    if path.name.endswith(".jinja") and not path.name.endswith("_training.jinja")
}
TEMPLATES = {**OWN, **SHIPPED}


@cache
def tokenizer_with(name: str) -> TextTokenizer:
    """Return a tokenizer with the template `name`, and with the tags in it as tokens at which generation stops."""
    text = make_tokenizer("chatml")
    template = TEMPLATES[name].read_text(encoding="utf-8")
    tags = sorted({tag for tag in TAG.findall(template) if tag.startswith(("<|", "["))})
    added = [AddedToken(tag, special=True, normalized=False) for tag in tags]
    text.tokenizer.add_tokens(added, special_tokens=True)
    text.tokenizer.bos_token = text.tokenizer.pad_token
    text.tokenizer.chat_template = template
    return text
