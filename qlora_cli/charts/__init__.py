"""Charts on matplotlib, as pictures or as SVG of a web page. Independent of the rest of the project."""
