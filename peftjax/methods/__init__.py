"""One published method per file, grouped by mechanism."""
