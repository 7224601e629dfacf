"""Settle what a run decides by trying: whether its base is sharded, and a base of its own."""
