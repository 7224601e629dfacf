"""Predict the time of a training step: its operations, what a GPU sustains, and a roofline of the two."""
