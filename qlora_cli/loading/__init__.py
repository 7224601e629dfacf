"""The one loader that every command uses: find the files, quantize, tokenizer, adapter, inventory."""

import logging

# bitsandbytes warns on import when an optional CPU kernel for inference is not installed. It would only be
# used after a repacking of the weights that the loader switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# It also says at every product that LLM.int8() casts its input to fp16; the loader says so once.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
# And accelerate warns that what is kept on the CPU has a placeholder on no device, as was asked for.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
