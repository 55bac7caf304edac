"""What every package may use: messages, terminal text, files and hashes, YAML, the Hugging Face hub."""
