"""The settings, a module for each section of a settings file."""
