"""Small data sets, and how tests read them."""
