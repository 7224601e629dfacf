"""How a model computes attention: the kernel that PyTorch chooses, and implementations for where it has none."""
