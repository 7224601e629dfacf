"""Memory: measured here; predicted by what follows."""
