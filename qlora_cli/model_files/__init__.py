"""Find a model on disk or on the hub, and read its configs and headers, before any weight is read."""
