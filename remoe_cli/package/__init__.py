"""From a plan to what is deployed: the function's code, one shard of experts a function, and a manifest."""
