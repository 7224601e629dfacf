"""Damaged, hostile and random input for what reads files of others: seconds in the tests, minutes by a script."""
