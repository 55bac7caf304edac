"""Compress, Then Prompt."""
