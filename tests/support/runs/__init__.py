"""Runs and merges, made or described."""
