"""The one loader that every command uses: plan, tokenizer, weights, adapter, report."""

import logging

# accelerate warns that what is kept on the CPU has a placeholder on no device, as was asked for.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
