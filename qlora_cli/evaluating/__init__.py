"""Measure loss and perplexity of base, adapter and merged model on held-out rows, and run lm-eval's tasks."""
