"""Plan a merge: read the inputs, and assign each tensor of the base its change. Nothing is written."""
