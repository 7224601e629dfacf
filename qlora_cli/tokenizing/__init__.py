"""Load a model's tokenizer and chat template, render conversations, and count positions."""
