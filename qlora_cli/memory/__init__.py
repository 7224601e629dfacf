"""Predict the memory of a training run before it starts."""
