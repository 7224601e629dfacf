"""Store the frozen base: choose the weights to quantize, count their bytes, quantize and restore them."""
