"""How the frozen base is stored: which weights are quantized, what that takes, and how they are when read."""
