"""The machine: its device, its counters of memory, and what a run records of it."""
