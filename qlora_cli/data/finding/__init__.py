"""Find files of rows by the name of a data set."""
