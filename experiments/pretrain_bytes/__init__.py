"""A small Llama pre-trained on bytes with every optimizer."""
