"""What tests read from the source of the package."""
