"""Trace a training step on the meta device: when each tensor is allocated and released, without its bytes."""
