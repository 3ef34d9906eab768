"""Pre-training with projected optimizers: memory, loss, and what a new projection costs."""
