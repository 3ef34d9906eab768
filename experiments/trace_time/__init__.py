"""The time to trace an adapted model."""
