"""Render conversations to text by a chat template, without losing any of their values."""
