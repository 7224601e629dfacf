"""Generate answers to prompts, by the chat template, from the base, the adapter and the merged model."""
