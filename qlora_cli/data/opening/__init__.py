"""Look at the first rows of what is to be trained, before any work begins."""
