"""What Lambda gives a worker process, and its words for a worker's end."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from remoe_cli.deploy.local.config import FunctionConfig
from remoe_cli.lambda_limits import PAYLOAD_LIMIT_BYTES, thread_environment

REGION, ACCOUNT = "us-east-1", "000000000000"
_SIGNALS = {signal.SIGKILL: "killed", signal.SIGSEGV: "segmentation fault", signal.SIGABRT: "aborted", signal.SIGTERM: "terminated"}


@dataclass(frozen=True)
class Fault:
    """Why a worker was ended, or ended by itself. `message` follows `RequestId: ... Error: ` as on AWS."""

    error_type: str
    message: str


OUT_OF_MEMORY = Fault("Runtime.OutOfMemory", "Runtime exited with error: signal: killed")
STOPPED = Fault("Runtime.ExitError", "Runtime exited with error: signal: stopped")
TOO_LARGE = Fault(
    "Function.ResponseSizeTooLarge",
    f"Response payload size exceeded maximum allowed payload size ({PAYLOAD_LIMIT_BYTES} bytes).",
)


def environment(function: FunctionConfig, port: int, stream: str, scratch: Path) -> dict[str, str]:
    """Make the worker's whole environment: what Lambda sets, and the function's own variables.

    Of the parent's environment it has only PATH. `scratch` is what /tmp is on Lambda; /tmp itself is everybody's here. Python imports
    nothing from a user's folder or the current one, which others may have written.
    """
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "PYTHONNOUSERSITE": "1",
        "PYTHONSAFEPATH": "1",
        "LANG": "en_US.UTF-8",
        "TZ": ":UTC",
        "LAMBDA_TASK_ROOT": function.code_dir,
        "_HANDLER": function.handler,
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{port}",
        "AWS_LAMBDA_FUNCTION_NAME": function.name,
        "AWS_LAMBDA_FUNCTION_VERSION": "$LATEST",
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(function.memory_mb),
        "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
        "AWS_LAMBDA_LOG_GROUP_NAME": f"/aws/lambda/{function.name}",
        "AWS_LAMBDA_LOG_STREAM_NAME": stream,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "PYTHONPATH": function.code_dir,
        **thread_environment(function.memory_mb),
        **function.environment,
    }


def describe(status: int) -> str:
    """Describe a process's end as Lambda does.

    >>> describe(3), describe(-9)
    ('exit status 3', 'signal: killed')
    """
    if status >= 0:
        return f"exit status {status}"
    try:
        number = signal.Signals(-status)
    except ValueError:
        return f"signal: {-status}"
    return f"signal: {_SIGNALS.get(number, number.name)}"
