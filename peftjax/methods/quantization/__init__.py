"""Bases of which there are codes of a few bits alone, and what is trained on them."""
