"""Turn the name of a data set into rows, and rows into tokens and labels."""
