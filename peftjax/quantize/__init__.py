"""Codecs of numbers, shared by weights, optimizers and residuals."""
