"""A run afterwards, or while it goes on: read from its directory, summed up, shown as a page. Imports no torch."""
