"""Settings: every one is defined once, in `models`, and resolved from file, `--set` and flags in `resolve`."""
