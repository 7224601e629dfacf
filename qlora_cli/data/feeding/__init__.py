"""Which rows are trained and which held out, how often, and in which order."""
