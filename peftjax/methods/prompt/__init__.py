"""Trained vectors that attention reads beside the tokens."""
