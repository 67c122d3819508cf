"""Settings for all tests, before anything heavy is imported."""

from __future__ import annotations

import os

# Tiny models gain nothing from threads, and spinning ones starve the worker processes that run beside them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
# No test may reach for a hub, whatever the machine allows.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
