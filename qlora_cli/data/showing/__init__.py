"""What training would see, as a report, a preview and a page."""
