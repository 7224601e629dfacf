"""Models, tokenizers and adapters made for tests, and references for them."""
