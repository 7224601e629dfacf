"""Checks before a run trains, from the cheapest to the most expensive, and of its adapter afterwards."""
