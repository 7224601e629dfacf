"""Trace a training step on the meta device: every tensor that is allocate and dies, without its bytes."""
