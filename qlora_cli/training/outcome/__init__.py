"""What became of a run, measured at its end."""
