"""From text to tokens and labels, and where they are kept."""
