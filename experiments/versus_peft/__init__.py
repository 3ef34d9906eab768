"""LoRA and full fine-tuning in peftjax and in Hugging Face's PEFT, step against step."""
