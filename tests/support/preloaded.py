"""What every process of tests/support/forked.py starts with: importing this module imports it."""

from __future__ import annotations

import gc
import importlib

# The collector would go through what is imported again and again. Frozen, it is never gone through: a forked process would copy all of it.
gc.disable()
for name in (
    *("remoe_cli.cli.app", "remoe_cli.plan.build", "remoe_cli.predict.train", "remoe_cli.profile.latency", "remoe_cli.runtime.client"),
    *("remoe_cli.deploy.local.target", "remoe_cli.model.shards", "remoe_cli.model.tokens", "remoe_cli.runtime.engine"),
    *("transformers.models.qwen2_moe.modeling_qwen2_moe", "transformers.models.qwen3_moe.modeling_qwen3_moe"),
):
    importlib.import_module(name)
gc.freeze()
gc.enable()
