"""Show what training would see: a report, a preview and a page."""
