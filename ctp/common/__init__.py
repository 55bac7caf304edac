"""What every package may use: messages, files, YAML, the terminal, the Hugging Face hub."""
