"""The commands, one module each, and the parsing of `inspect-memory`'s flags."""
