"""Recognise the format of rows, and read them into conversations, texts or tokens."""
