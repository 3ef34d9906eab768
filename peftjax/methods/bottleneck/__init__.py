"""Small networks inside the blocks."""
