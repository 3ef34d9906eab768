"""MiniLM adapted to SST-2."""
