"""LoRA adapters: find their targets, initialize, read, attach and save them."""
