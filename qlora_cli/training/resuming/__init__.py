"""Resume a run: choose its checkpoint, check changed settings, restore the state."""
