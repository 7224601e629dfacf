"""Turn text into tokens and labels, and cache them on disk."""
