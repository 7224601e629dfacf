"""Damaged, hostile and random input for code that reads foreign files: seconds in the tests, minutes by a script."""
