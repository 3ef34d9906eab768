"""What methods need, and what accuracy is left: methods of blocks beside LoRA and full fine-tuning."""
