"""What remoe knows about a transformers model: its sizes, its experts, and how to load a part of it."""
