"""Sparse methods beside low-rank ones: which, with how many parameters, and on what."""
