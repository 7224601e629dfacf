"""What a model is made of on the disk: found, and read as far as headers, before a weight is."""
