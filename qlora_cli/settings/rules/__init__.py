"""The rules between settings: which have no effect, or can't work, with others."""
