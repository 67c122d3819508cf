"""What remoe knows about a transformers model: its sizes, its experts hook, and how to load a part of it."""
