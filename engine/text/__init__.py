"""Prompts into tokens and tokens into answers."""
