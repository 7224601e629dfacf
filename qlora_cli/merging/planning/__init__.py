"""Plan a merge: what is read, and which tensor of the base gets which change. Nothing is written."""
