"""The machine: its device, its memory counters, and its description in a run's record."""
