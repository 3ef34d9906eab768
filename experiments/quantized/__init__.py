"""What a base of a few bits costs and saves."""
