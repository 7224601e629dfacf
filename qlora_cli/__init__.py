"""QLoRA fine-tuning of language models on one GPU: predict, plan, train, prove."""

import logging

__version__ = "0.1.0"

# bitsandbytes warns on import when an optional CPU kernel for inference is not installed. It would only be used after
# a repacking of the weights that the loader switches off. Here, because any module may be the first that imports it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# It also says at every product that LLM.int8() casts its input to fp16; the loader says so once.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
