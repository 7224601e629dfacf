"""The hub: repositories opened, files fetched, results pushed."""
