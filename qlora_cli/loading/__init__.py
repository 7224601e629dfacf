"""Load a model, for every command: plan, tokenizer, weights, adapter, report."""

import logging

# accelerate warns about meta placeholders of weights on the CPU, which are intended.
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
