"""A small ViT adapted from the digits 0-4 to the digits 5-9."""
