"""Replay a trace through PyTorch's caching allocator: load, adapter, steps, evaluation."""
