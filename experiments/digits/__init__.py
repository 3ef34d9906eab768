"""A small ViT trained on the digits 0-4 and adapted to 5-9."""
