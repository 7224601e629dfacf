"""Merge adapters into their base: planned, checked, applied tensor by tensor, and compared."""
