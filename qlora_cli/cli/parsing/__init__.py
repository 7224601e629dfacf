"""Values of flags that take more than a word each: prices, and what a sweep varies."""
