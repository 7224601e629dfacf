"""QLoRA fine-tuning of language models on one GPU: predict, plan, train, prove."""

import logging

__version__ = "0.1.0"

# bitsandbytes warns on import if an optional CPU kernel for inference is not installed. The kernel needs repacked
# weights, which the loader disables. The level is set here because any module may be the first to import it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# It also warns at each product that LLM.int8() casts its input to fp16; the loader reports that once.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
