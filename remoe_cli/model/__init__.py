"""What remoe knows about a transformers model: its sizes, its experts, and how to load a part of it."""

import os

# transformers, when it is imported, looks whether it may download kernels from the hub and run them (where the package `kernels` is
# installed): some families ask for one by themselves. remoe runs no code that is not installed.
os.environ.setdefault("USE_HUB_KERNELS", "NO")
