"""Select, hold out, mix, pack and order the rows to feed."""
