"""Charts on matplotlib: series and notes in, a picture or the SVG of a web page out. Knows nothing of the project."""
