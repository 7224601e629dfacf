"""The programs of llama.cpp that write its files, and what is in a file: found, run and read."""
