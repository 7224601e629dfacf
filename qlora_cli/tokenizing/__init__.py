"""What every part does with a tokenizer and its chat template."""
