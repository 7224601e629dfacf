"""Asking a model: prompts by its template, answers from the base, with the adapter, and from the merged model."""
