"""Progress of a run on stderr: a live display, or plain lines."""
