"""What all experiments share: contenders, training, timing, memory, records, reports and plots."""
