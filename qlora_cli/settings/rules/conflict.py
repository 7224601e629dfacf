"""A setting that has no effect, or can't work, with the others."""

Conflict = tuple[str, str, str]  # the setting as `section.key`, the message, and a hint
