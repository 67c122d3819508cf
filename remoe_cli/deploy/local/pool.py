"""The execution environments of one function: start, reuse, throttle, end."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from remoe_cli.deploy.local import processes
from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.deploy.local.instance import CallResult, Host, Instance, InstanceState, Sink, Undelivered


class Throttled(Exception):
    """All execution environments that reserved concurrency allows are busy."""


@dataclass
class Counters:
    """What a function has done since the deployment started, without throttled calls (not billed)."""

    invocations: int = 0
    cold_starts: int = 0
    errors: int = 0
    billed_ms: int = 0


@dataclass
class Pool:
    """The environments of one function; `instances` may still run, least recently used first."""

    function: FunctionConfig
    host: Host
    idle_ttl_s: float
    instances: list[Instance] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    closed: bool = False
    _reclaims: dict[Instance, asyncio.TimerHandle] = field(default_factory=dict)
    _stopping: set[asyncio.Task[None]] = field(default_factory=set)

    async def invoke(self, request_id: str, event: bytes, sink: Sink | None = None) -> CallResult:
        """Run one request on an idle environment, else on a new one.

        Raises: Throttled when there may not be another.
        """
        while True:
            instance = self._acquire()
            try:
                done = await instance.invoke(request_id, event, sink)
            except Undelivered:
                continue
            finally:
                self._release(instance)
            self.counters.invocations += 1
            self.counters.cold_starts += done.init_ms is not None
            self.counters.errors += done.failed
            self.counters.billed_ms += done.billed_ms
            return done

    async def close(self) -> None:
        """End every environment, wait for the ends, and start no more."""
        self.closed = True
        for timer in self._reclaims.values():
            timer.cancel()
        instances, self.instances = self.instances, []
        await asyncio.gather(*(instance.stop() for instance in instances), *self._stopping)

    def _acquire(self) -> Instance:
        """Take an environment that nobody else has until it is released; drop idle ones that cannot answer."""
        for instance in reversed(list(self._reclaims)):  # the last one put in is the one used most recently
            self._reclaims.pop(instance).cancel()
            if instance.state is InstanceState.IDLE and not processes.is_stopped(instance.pid):
                return instance
            self._drop(instance)
        living = sum(instance.state is not InstanceState.DEAD for instance in self.instances)
        if self.closed or living >= self.function.reserved_concurrency:
            raise Throttled
        instance = Instance(self.function, self.host)
        self.instances.append(instance)
        return instance

    def _release(self, instance: Instance) -> None:
        if instance.state is InstanceState.IDLE:
            self._reclaims[instance] = asyncio.get_running_loop().call_later(self.idle_ttl_s, self._reclaim, instance)
        else:
            self._drop(instance)

    def _reclaim(self, instance: Instance) -> None:
        del self._reclaims[instance]
        self._drop(instance)

    def _drop(self, instance: Instance) -> None:
        if instance in self.instances:
            self.instances.remove(instance)
        task = asyncio.get_running_loop().create_task(instance.stop())
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)
