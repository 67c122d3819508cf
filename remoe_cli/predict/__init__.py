"""Predicting which experts a prompt will use, from prompts whose routing is known."""
