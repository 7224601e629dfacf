"""Experiments on what a setting does to the trained model."""
