"""A small Llama trained from scratch, so that there is a decoder without any download."""
