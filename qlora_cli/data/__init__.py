"""From a name to rows, from rows to tokens and labels."""
