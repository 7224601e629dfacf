"""What is checked before a run trains, from the cheapest to the dearest, and of its adapter after it."""
