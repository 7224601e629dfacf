"""What a row means: its format, and the conversation, text or tokens that it is read into."""
