"""Choose the 4-bit codes of a base by what its layers compute on given rows."""
