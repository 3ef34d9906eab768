"""What sparse tuning needs in memory."""
