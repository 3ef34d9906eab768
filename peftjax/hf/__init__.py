"""Adapters in the file format of Hugging Face's PEFT library, for LoRA and its relatives."""
