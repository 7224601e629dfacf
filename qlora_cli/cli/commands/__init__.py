"""The commands, a module each, and what `inspect-memory` reads of its flags."""
