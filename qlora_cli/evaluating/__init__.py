"""Loss and perplexity on held-out rows of base, adapter and merged model, and tasks handed over to lm-eval."""
