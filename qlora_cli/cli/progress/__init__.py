"""A run while it goes on, on stderr: a live display, or plain lines."""
