"""How the frozen base is stored: which weights are quantized, what that takes, and how they are when read."""

import logging

# bitsandbytes warns on import when an optional CPU kernel for inference is not installed. It would only be
# used after a repacking of the weights that the loader switches off.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# It also says at every product that LLM.int8() casts its input to fp16; the loader says so once.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
