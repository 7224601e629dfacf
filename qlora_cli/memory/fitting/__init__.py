"""What fits on a GPU: the plan of a run, changes that make it fit, limits of a setting, other cards and models."""
