"""Files of settings: presets, those that are written, and what YAML may hold."""
