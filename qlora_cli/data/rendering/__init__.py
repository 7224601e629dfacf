"""From conversations to text by a chat template, with nothing lost."""
