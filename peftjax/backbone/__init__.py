"""The stack of blocks that every family of models shares."""
