"""What a new projection costs, how much of the gradient it keeps, and what it does to the loss."""
