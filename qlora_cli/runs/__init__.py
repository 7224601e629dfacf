"""A run, finished or still running: read from its directory, summed up, shown as a page. Imports no torch."""
