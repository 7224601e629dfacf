"""The base model."""

from typing import Annotated

from pydantic import Field

from qlora_cli.settings.choices import Attention, Device, Dtype
from qlora_cli.settings.help_groups import HelpGroup
from qlora_cli.settings.section import Section
from qlora_cli.settings.setting_metadata import (
    BASES,
    LOADERS,
    READERS,
    TOKENIZERS,
    Command,
    Metadata,
    Named,
    OnResume,
)
from qlora_cli.settings.values import NameList, RopeScaling


class ModelSettings(Section):
    """The base model."""

    # Inherited from a run are the settings that determine the base of its adapter. New tokens and chat template come
    # with the adapter's tokenizer; device and kernel are those of this machine; trust in code is never inherited.

    name: Annotated[
        str,
        Metadata(
            flag="--model",
            names=Named.MODEL,
            group=HelpGroup.ESSENTIALS,
            commands=(Command.TRAIN, Command.INSPECT_DATA),
            argument_of=(Command.LOAD, Command.INSPECT_MEMORY, Command.GENERATE, Command.CHAT, Command.EVALUATE),
            affects_memory=True,
        ),
    ] = Field(min_length=1, description="Base model: a local directory or a hub id.")
    revision: Annotated[str | None, Metadata(flag="--revision", commands=TOKENIZERS, affects_memory=True)] = Field(
        default=None, description="Branch, tag or commit of a hub id; the default branch if not given."
    )
    base_model: Annotated[
        str | None,
        Metadata(flag="--base-model", commands=BASES, affects_memory=True, on_resume=OnResume.FREE, names=Named.MODEL),
    ] = Field(
        default=None,
        min_length=1,
        description="Base of the adapter or run, as a directory or a hub id, instead of the one that it names.",
    )
    dtype: Annotated[
        Dtype,
        Metadata(
            flag="--dtype",
            group=HelpGroup.MEMORY,
            commands=LOADERS,
            affects_memory=True,
            is_inherited=True,
            on_resume=OnResume.FREE,
        ),
    ] = Field(
        default=Dtype.AUTO,
        description="Compute dtype. auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU.",
    )
    device: Annotated[
        Device, Metadata(flag="--device", group=HelpGroup.MEMORY, commands=READERS, on_resume=OnResume.FREE)
    ] = Field(default=Device.AUTO, description="auto: the GPU if there is one, else the CPU.")
    attention: Annotated[
        Attention,
        Metadata(
            flag="--attention", group=HelpGroup.MEMORY, commands=LOADERS, affects_memory=True, on_resume=OnResume.FREE
        ),
    ] = Field(
        default=Attention.AUTO,
        description=(
            "Attention kernel. auto: sdpa, PyTorch's own; for models that it can't compute, blockwise. flex_attention "
            "and flash_attention_2 and 3 need a GPU and a package."
        ),
    )
    offload_embedding: Annotated[
        bool,
        Metadata(
            flag="--offload-embedding",
            group=HelpGroup.MEMORY,
            commands=LOADERS,
            affects_memory=True,
            on_resume=OnResume.FREE,
        ),
    ] = Field(default=False, description="Keep the embedding in host memory and look tokens up there; needs a GPU.")
    new_tokens: Annotated[
        NameList,
        Metadata(
            flag="--new-tokens",
            group=HelpGroup.ADAPTER,
            commands=(Command.LOAD, Command.TRAIN, Command.INSPECT_DATA),
            affects_memory=True,
        ),
    ] = Field(default=None, description="Comma-separated tokens to add to the vocabulary; their rows are trained.")
    resize_vocab: Annotated[
        bool, Metadata(flag="--resize-vocab", commands=TOKENIZERS, affects_memory=True, is_inherited=True)
    ] = Field(default=False, description="Grow the embedding (and head) when the tokenizer has more ids than rows.")
    rope_scaling: Annotated[
        RopeScaling, Metadata(flag="--rope-scaling", commands=TOKENIZERS, affects_memory=True, is_inherited=True)
    ] = Field(
        default=None,
        description="Scale the rotary positions, as TYPE:FACTOR (linear, dynamic or yarn), such as yarn:4.",
    )
    chat_template: Annotated[
        str | None,
        Metadata(flag="--chat-template", group=HelpGroup.DATA, commands=(*TOKENIZERS, Command.INSPECT_MEMORY)),
    ] = Field(
        default=None,
        min_length=1,
        description="Chat template: a .jinja file, a name that the tokenizer has, or chatml.",
    )
    allow_pickle: Annotated[
        bool, Metadata(flag="--allow-pickle", commands=READERS, on_resume=OnResume.FREE, is_forbidden_in_files=True)
    ] = Field(default=False, description="Read pickled .bin weights if there are no safetensors; never from a file.")
    trust_remote_code: Annotated[
        bool,
        Metadata(
            flag="--trust-remote-code",
            commands=BASES,
            affects_memory=True,
            on_resume=OnResume.FREE,
            is_forbidden_in_files=True,
        ),
    ] = Field(default=False, description="Run the Python code that comes with the model; never from a file.")
