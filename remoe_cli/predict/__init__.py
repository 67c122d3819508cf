"""Predicting which experts a prompt will use, from prompts that are known."""
