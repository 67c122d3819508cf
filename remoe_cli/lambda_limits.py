"""Limits of AWS Lambda: the twin enforces them, dispatcher and main function stay below them.

They are the same in every region and for every account. What an account can have raised, and what AWS charges, is data:
deploy/aws/data/aws.toml; a test holds that both say the same.

Source: AWS Lambda developer guide, "Lambda quotas" (memory, timeout, payload), "Response streaming", "Configure Lambda function memory"
(MB per vCPU) and "Understanding the Lambda execution environment lifecycle" (init).
"""

from __future__ import annotations

from remoe_cli import openmp

MIN_MEMORY_MB, MAX_MEMORY_MB = 128, 10_240
MB_PER_VCPU = 1769
MAX_TIMEOUT_S = 900
INIT_LIMIT_S = 10.0  # to load the code, before the first event; an init that takes longer counts as failed
WAY_S = 5.0  # for a call and its answer on the way, at the most
STREAM_LIMIT_BYTES = 200 << 20  # of a streamed response
PAYLOAD_LIMIT_BYTES = 6_291_456  # of a synchronous request, and of its response; SageMaker's InvokeEndpoint takes as much


def vcpus(memory_mb: int) -> float:
    """Return the CPU share that comes with this memory.

    >>> vcpus(3538)
    2.0
    """
    return memory_mb / MB_PER_VCPU


def threads(memory_mb: int) -> int:
    """Return the number of threads worth starting: more of them than whole vCPUs only wait for each other.

    >>> [threads(memory_mb) for memory_mb in (128, 1769, 3600)]
    [1, 1, 2]
    """
    return max(1, memory_mb // MB_PER_VCPU)


def thread_environment(memory_mb: int) -> dict[str, str]:
    """Return the environment variables that make OpenMP and BLAS start so many threads.

    Threads that spin cost more than the work where there are fewer cores than threads (measured: 1 ms becomes 28 ms).
    """
    count = str(threads(memory_mb))
    return {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, **openmp.WAITS}


def read_timeout_s(timeout_s: float) -> float:
    """Return how long to wait for the answer of a function that is ended after `timeout_s`.

    Nobody stops waiting before the platform does: what is answered later would be billed and lost. A cold start comes before the timeout.

    >>> read_timeout_s(900)
    915.0
    """
    return timeout_s + INIT_LIMIT_S + WAY_S
