"""What a method is, several of them as one, and the registry."""
