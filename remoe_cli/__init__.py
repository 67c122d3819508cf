"""remoe: mixture-of-experts models with rarely used experts in serverless functions."""

__version__ = "0.1.0"
