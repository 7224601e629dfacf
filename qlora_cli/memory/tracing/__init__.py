"""Trace a training step on the meta device: every tensor that is born and dies, without its bytes."""
