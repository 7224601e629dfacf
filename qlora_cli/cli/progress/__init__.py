"""A run in progress, on stderr: a live display, or plain lines."""
