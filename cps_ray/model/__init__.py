"""A trained model away from its training: its folder written and read, what it predicts, how well, and in which other forms."""
