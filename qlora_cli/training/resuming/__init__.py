"""Resume a run: from which checkpoint, with which settings changed, and with which state."""
