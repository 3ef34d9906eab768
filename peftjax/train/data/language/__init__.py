"""Data for language models: one file per source, how it is cut to length, packed and batched."""
