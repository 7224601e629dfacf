"""The module by which llama-cpp-python is told from others of its name."""
