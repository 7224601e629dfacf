"""Read the rows of files of every kind, and of the hub, one at a time."""
