"""The processes of a run: which one this is, what they say to each other, and how they are started."""
