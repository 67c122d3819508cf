"""The files of a twin deployment: twin.json says what it consists of, the others what runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from remoe_cli.artifacts import Document, Part
from remoe_cli.lambda_limits import MAX_MEMORY_MB, MAX_TIMEOUT_S, MIN_MEMORY_MB

NAME_FORM = r"[a-z0-9][a-z0-9-]{0,49}"  # with an entry of the bundle, such as -layer-012-3, 64 characters
DeploymentName = Annotated[str, Field(pattern=f"^{NAME_FORM}$")]
FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class FunctionConfig(Part):
    """One function, within Lambda's limits (lambda_limits.py).

    handler       `module.function` in `code_dir`, an absolute path
    runtime       the module that runs it
    interpreter   the command of another Python than the twin's
    """

    name: FunctionName
    handler: str
    runtime: str = "awslambdaric"
    code_dir: str
    interpreter: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    memory_mb: int = Field(ge=MIN_MEMORY_MB, le=MAX_MEMORY_MB)
    timeout_s: float = Field(gt=0, le=MAX_TIMEOUT_S)
    reserved_concurrency: int = Field(ge=1)


class MainConfig(Part):
    """The main server: `argv` starts it, and GET /ping answers 200 when it is ready.

    It serves the listening socket whose descriptor is $REMOE_LISTENER, and ends when its standard input is closed.
    """

    argv: list[str] = Field(min_length=1)


class TwinConfig(Document):
    """twin.json: one deployment.

    main         a server, a function that may invoke the others, or none
    rtt_ms       waited in each invocation, for the network
    idle_ttl_s   an execution environment that is idle for so long is ended
    python       the interpreter that has awslambdaric
    """

    schema_version: str = "remoe.twin/1"
    name: DeploymentName
    functions: tuple[FunctionConfig, ...]
    main: MainConfig | FunctionConfig | None = None
    rtt_ms: float = Field(default=0.0, ge=0)
    idle_ttl_s: float = Field(default=300.0, gt=0)
    python: str


class ProcessRef(Part):
    """A process, told by `start_time` from a later process with the same pid. The system defines its unit."""

    pid: int
    start_time: str


class Place(Part):
    """Where processes run. A process id says nothing in another place."""

    host: str
    machine: str
    boot: str
    pid_namespace: str


class HostRecord(Document):
    """host.json: where a deployment's processes run, written before any of them is started."""

    schema_version: str = "remoe.twin-host/1"
    place: Place


class SupervisorRecord(Document):
    """supervisor.json: the supervisor, its endpoint, and the control groups that hold every worker."""

    schema_version: str = "remoe.twin-supervisor/1"
    process: ProcessRef
    endpoint: str
    groups: tuple[str, ...]


class ChildrenRecord(Document):
    """children.json: every process that must not outlive the deployment."""

    schema_version: str = "remoe.twin-children/1"
    children: tuple[ProcessRef, ...]
