"""Keep the remote experts that are used most in the main process's spare memory, while it serves.

The plan's memory of the main function has room for its longest requests. What is left besides, less a reserve, holds experts of expert
functions: those that most passes have needed lately. They are read from the functions' own shards, one after another in a thread of their
own, and each is held against its digest. They compute as local experts do. A call of which all rows are of such experts is not made; what
it would have cost is what the same function's calls of about as many rows were billed in the mean.

An expert takes the place of another one only if it was used clearly more often, so that equally used ones do not take turns.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from remoe_cli.function.weights import Shard
from remoe_cli.model.experts import ExpertLayer, run_expert
from remoe_cli.model.ffn import from_storage
from remoe_cli.model.gpu_experts import apart
from remoe_cli.model.products import prepare_products
from remoe_cli.plan.cost.prices import calls_usd
from remoe_cli.redaction import redacted
from remoe_cli.runtime.answer import Saved
from remoe_cli.runtime.free_memory import available_bytes
from remoe_cli.runtime.hedging import size_class
from remoe_cli.runtime.invoke import Invocation, only_reads
from remoe_cli.runtime.last_resort import LastResort, ShardPlace
from remoe_cli.runtime.remote_function import RemoteFunction
from remoe_cli.runtime.server_config import ServerConfig

_CLEARLY = 1.5
_FREE_SHARE = 0.5  # of the memory that is free when the model is loaded: KV caches need some too
_FAILURES = 3  # in a row, after which nothing is loaded any more
_AGE = 256  # uses of each remote expert in the mean, after which all counts are halved
_log = logging.getLogger(__name__)  # without a handler, its warnings go to stderr: the log of a main function
Key = tuple[int, int]  # hidden layer and expert


@dataclass
class ExpertCache:
    """Experts that are used as local ones, although a function has them.

    `use` loads others in the background.

    remote   hidden layer -> its functions
    room     how many experts there is memory for
    shard    opens a shard
    usd      prices a call: function, memory in MB, and billed milliseconds
    held     what is here now, by hidden layer and expert: a module with the weights of this expert alone
    """

    remote: Mapping[int, Sequence[RemoteFunction]]
    room: int
    shard: Callable[[ShardPlace], Shard]
    usd: Callable[[str, int, float], float]
    held: dict[Key, nn.Module] = field(default_factory=dict)
    _uses: Counter[Key] = field(default_factory=Counter)
    _total: int = 0
    _billed: dict[str, dict[int, tuple[int, float, int]]] = field(default_factory=dict)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "cache"))
    _loading: Future[None] | None = None
    _read: list[Invocation] = field(default_factory=list)
    _failures: int = 0

    def use(self, layer: ExpertLayer, experts: Sequence[int]) -> dict[int, nn.Module]:
        """Count the remote experts that a pass needs, and return those that are here.

        One that is not may be loaded for later passes.
        """
        keys = [(layer.layer, expert) for expert in experts]
        self._uses.update(keys)
        self._total += len(keys)
        if self._total > _AGE * sum(len(f.experts) for functions in self.remote.values() for f in functions):
            self._uses, self._total = Counter({key: count // 2 for key, count in self._uses.items()}), self._total // 2
        found = {key[1]: module for key in keys if (module := self.held.get(key)) is not None}
        if missing := [key for key in keys if key[1] not in found]:
            self._load(layer, max(missing, key=self._uses.__getitem__))
        return found

    def run(self, layer: ExpertLayer, module: nn.Module, rows: Tensor) -> Tensor:
        """Compute an expert that is here, as a local one. Shapes: rows [n, H] to [n, H]."""
        return run_expert(replace(layer, module=module), 0, rows)

    def learn(self, call: Invocation) -> None:
        """Take note of what a call was billed."""
        if call.plain and not call.failed and call.rows:
            of_function, rows = self._billed.setdefault(call.function, {}), size_class(call.rows)
            count, billed_ms, _ = of_function.get(rows, (0, 0.0, 0))
            of_function[rows] = count + 1, billed_ms + call.billed_ms, call.memory_mb

    def saving(self, function: str, rows: int) -> Saved:
        """Say what a call that is not made would have cost.

        Where the function was not called with about as many rows, that is what its calls of the next size were billed; where it was never
        called, the fee of a call.
        """
        sizes = self._billed.get(function, {})
        if not sizes:
            return Saved(1, self.usd(function, 0, 0.0))
        count, billed_ms, memory_mb = sizes[min(sizes, key=lambda size: abs(size - size_class(rows)))]
        return Saved(1, self.usd(function, memory_mb, billed_ms / count))

    def reads(self) -> list[Invocation]:
        """Return the reads of S3 since the last call, which are billed as those of calls."""
        made = self._read[:]
        del self._read[: len(made)]
        return made

    def settle(self) -> None:
        """Wait until nothing is being loaded."""
        if self._loading is not None:
            wait_for([self._loading])

    def _load(self, layer: ExpertLayer, key: Key) -> None:
        """Begin to load an expert if there is room, or another one is used clearly less."""
        if self._failures >= _FAILURES or not self.room or (self._loading is not None and not self._loading.done()):
            return
        leaving = None
        if len(self.held) >= self.room:
            leaving = min(self.held, key=self._uses.__getitem__)
            if self._uses[key] < _CLEARLY * (self._uses[leaving] + 1):
                return
        function = next(f for f in self.remote[key[0]] if key[1] in f.experts)
        self._loading = self._pool.submit(self._bring, layer, key, function, leaving)

    def _bring(self, layer: ExpertLayer, key: Key, function: RemoteFunction, leaving: Key | None) -> None:
        """Read an expert, in the thread for that. What fails several times ends all loading, and is said once.

        No shard stays open: one in S3 has threads, connections and credentials that end, and there may be hundreds of them.
        """
        shard = None
        try:
            assert function.shard is not None, "nobody knows where its shard is"
            shard = self.shard(function.shard)
            tensors = shard.tensors(key[1])
            dtype = next(iter(layer.parameters().values())).dtype
            weights = {name: from_storage(tensors[name], dtype).unsqueeze(0).clone() for name in tensors}
            if leaving is not None:
                del self.held[leaving]  # before, not after: both would take more memory than there is
            module = apart(layer.module, weights)
            prepare_products(module, [module])
            self.held[key] = module
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures < _FAILURES:
                return
            where = f"expert {key[1]} of layer {key[0]}"
            _log.warning("No more experts are kept: %s could not be read (%s: %s).", where, type(error).__name__, redacted(str(error)))
        finally:
            if shard is not None:
                shard.close()
                if shard.reads:
                    self._read.append(only_reads(function.name, shard.reads))


def cache_of(config: ServerConfig, remote: Mapping[int, Sequence[RemoteFunction]], shards: LastResort) -> ExpertCache | None:
    """Make the cache of a main function, of at most half of the memory that is free.

    None, which the log says, where it has no room.
    """
    room = min(config.spare_experts, int(_FREE_SHARE * available_bytes() // config.spec.expert_bytes))
    if not room or not remote:
        why = (
            "it has no expert functions"
            if not remote
            else "this machine has no memory for them"
            if config.spare_experts
            else "the plan's main function has no room beside its longest requests, or an earlier version of remoe has deployed it"
        )
        _log.warning("No experts are kept in spare memory: %s.", why)
        return None
    money = config.prices

    def usd(function: str, memory_mb: int, billed_ms: float) -> float:
        return calls_usd(money.function, memory_mb, money.storage_mb.get(function, 0.0), [billed_ms], 1)

    return ExpertCache(remote, room, shards.shard, usd)
