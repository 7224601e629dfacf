"""Callbacks of transformers' trainer that watch a training loop and act between its steps."""
