"""What watches a training loop and acts between its steps, as callbacks of transformers' trainer."""
