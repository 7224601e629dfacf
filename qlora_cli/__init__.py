"""QLoRA fine-tuning of language models on one GPU: predict, plan, train, prove."""

__version__ = "0.1.0"
