"""The cost of a new projection of GaLore, the share of the gradient it keeps, and its effect on the loss."""
