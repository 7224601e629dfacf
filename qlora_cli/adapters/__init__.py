"""Adapters: their config, keys and values; where they go on a model, how they begin, and how they are saved."""
