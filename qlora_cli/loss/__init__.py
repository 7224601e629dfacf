"""The loss of a model from its last hidden states: the output head, and cross-entropy by chunks of tokens."""
