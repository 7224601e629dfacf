"""What a run costs besides the memory of its GPU: time, memory of the host, files."""
