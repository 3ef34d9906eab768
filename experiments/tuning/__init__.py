"""What comparisons of fine-tuning methods share: entrants, the loop compiled once, tables and plots."""
