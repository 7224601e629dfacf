"""Results as text on stdout."""
