"""What is known about each way in which an invocation can fail: one row of FAILURES for each kind.

A kind is the error type that a function reports (function/errors.py has those of expert functions), the error code of AWS's API, or the
class of an exception. A kind without a row is final, and its hint is SEE_LOGS.

Invocations of expert functions are tried again where the row has a `pause_s`. Experts are pure functions, so that is always safe; it is
worth it only where the next try can differ: a worker that died is replaced, a throttled function becomes free, S3 answers again. A function
that ran out of memory would do so again. Invocations of main functions are never tried again: an answer takes long and is paid for.

A retry waits for a random time up to a bound that doubles with each retry ("full jitter"), so that callers who failed together do not come
back together. Whether there may be a retry at all, the function's budget says (budget.py).

Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

To change a pause, change its row here and in tests/runtime/test_failures.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

RETRIES = 4  # at most, of one call

# Kinds of remoe's own.
DAMAGED = "DamagedAnswer"  # an answer that is no frame, or not one of this function to these rows
NOT_LAMBDA = "NotLambda"  # whoever answered, it was not Lambda, nor the twin

SEE_LOGS = "See 'remoe logs NAME' for what it printed, 'remoe status NAME' for its state."
LOG_IN = "Log in again, for example with 'aws sso login', or set new ones; 'aws sts get-caller-identity' tells whether they work."
_NETWORK = "Check the network; for a deployment on this machine, 'remoe status NAME' tells whether it runs."
_REPLACE_SHARD = "The shard in the bucket is not the one that was deployed: deploy the plan again."

# Error codes of all of AWS's services.
EXPIRED_CREDENTIALS = ("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired")
UNKNOWN_CREDENTIALS = (
    *("InvalidClientTokenId", "UnrecognizedClientException", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidSignatureException"),
    *("AuthFailure", "IncompleteSignature", "InvalidToken", "MissingAuthenticationToken"),
)
ACCESS_DENIED = ("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "AllAccessDisabled", "403")


@dataclass(frozen=True)
class Failure:
    """One kind of failure.

    pause_s   bound of the seconds before the first retry of an expert function; it doubles with each further retry. None: there is no retry
    lasts     the function would fail again, so it is not asked for a while (breaker.py)
    hint      what the user can do
    meaning   ends the sentence "The main function NAME ..."; empty where only the kind itself says what happened
    """

    kind: str
    pause_s: float | None = None
    hint: str = SEE_LOGS
    meaning: str = ""
    lasts: bool = False


FAILURES = (
    # Passing failures: the next try can differ.
    Failure("Runtime.ExitError", pause_s=0.0),
    Failure("ServiceException", pause_s=0.05),
    Failure("EndpointConnectionError", pause_s=0.1, hint=_NETWORK),
    Failure("ConnectTimeoutError", pause_s=0.1, hint=_NETWORK),
    Failure("ConnectionClosedError", pause_s=0.02),
    Failure("ProtocolError", pause_s=0.02),
    Failure("ResponseStreamingError", pause_s=0.02),
    Failure("IncompleteReadError", pause_s=0.02),
    Failure(DAMAGED, pause_s=0.02, hint="Deploy the plan again: the function may be of another version."),
    Failure("TooManyRequestsException", pause_s=0.2, hint="Ask again later.", meaning="is busy: it answers one request at a time"),
    Failure(
        "ShardUnreachableError",
        pause_s=0.2,
        hint="S3 did not answer the function: see the region's state, and the function's network if it is in a VPC.",
    ),
    # An expert function and its shard.
    Failure("FrameError", hint="Deploy the plan again: the function may be of another version; see 'remoe logs NAME'."),
    Failure("WeightsError", hint="The function's shard lacks an expert that it was asked for: deploy the plan again.", lasts=True),
    Failure("ShardDigestError", hint=_REPLACE_SHARD, lasts=True),
    Failure("ShardTruncatedError", hint=_REPLACE_SHARD, lasts=True),
    Failure("ShardMissingError", hint=_REPLACE_SHARD, lasts=True),
    Failure(
        "ShardDeniedError",
        hint="The function's role needs s3:GetObject on its shard, which must be in the bucket: deploy the plan again.",
        lasts=True,
    ),
    Failure("FunctionMemoryError", hint="Plan again with more memory for its functions, and deploy that.", lasts=True),
    Failure(
        "FunctionProcessorError",
        hint="Experts that are computed as they are stored (packed) need x86-64 with AVX2, FMA and F16C, or arm64: deploy to such a"
        " processor, or a plan whose experts are not quantised.",
        lasts=True,
    ),
    Failure("FunctionStorageError", hint="The function's ephemeral storage must hold its shard: deploy the plan again.", lasts=True),
    Failure(
        "FunctionTimeError",
        hint="Shorten the prompt, or plan again for requests as long as this one: a function's timeout is the plan's.",
    ),
    Failure(NOT_LAMBDA, hint="Check that it is Lambda or the local twin."),
    # Limits of Lambda.
    Failure(
        "Runtime.OutOfMemory",
        hint="Plan with more memory for it and deploy again; 'remoe logs NAME' shows how much it used.",
        meaning="ran out of memory",
        lasts=True,
    ),
    Failure("Sandbox.Timedout", hint="Ask for fewer tokens; 'remoe logs NAME' shows what it did.", meaning="ran out of time"),
    Failure(
        "RequestTooLargeException",
        hint="Shorten the prompt; 'remoe logs NAME' shows earlier requests.",
        meaning="refused the request as too large",
    ),
    # Whether it is there, and who may call it.
    Failure("ThrottlingException", hint="Ask again later.", meaning="is throttled"),
    Failure("ServiceUnavailable", hint="Ask again later.", meaning="is not available now"),
    Failure("ModelNotReadyException", hint="Ask again in a few minutes.", meaning="is still loading its model"),
    Failure("ResourceNotFoundException", hint=f"Deploy the plan again. {SEE_LOGS}", meaning="does not exist", lasts=True),
    Failure("ValidationError", meaning="does not exist or is not yet in service"),
    Failure("NoCredentialsError", hint="Log in, or set AWS_PROFILE.", meaning="may not be called: there are no AWS credentials"),
    *(Failure(code, hint=LOG_IN, meaning="may not be called: the credentials have expired") for code in EXPIRED_CREDENTIALS),
    *(Failure(code, hint=LOG_IN, meaning="may not be called: the credentials are not valid") for code in UNKNOWN_CREDENTIALS),
    *(
        Failure(code, hint="Use the credentials of the account that deployed it.", meaning="may not be called with these credentials")
        for code in ACCESS_DENIED
    ),
)
_BY_KIND = {failure.kind: failure for failure in FAILURES}


def failure(kind: str) -> Failure:
    """Look up a kind; a kind without a row is final.

    >>> failure("Runtime.OutOfMemory").meaning
    'ran out of memory'
    >>> failure("KeyError")
    Failure(kind='KeyError', pause_s=None, hint="See 'remoe logs NAME' for what it printed, ...", meaning='', lasts=False)
    """
    return _BY_KIND.get(kind, Failure(kind))


def pause_s(kind: str, attempt: int, retry_after_s: float = 0.0, draw: Callable[[], float] = random.random) -> float | None:
    """Draw the seconds to wait before retry number `attempt` + 1; None when the failure is final.

    `retry_after_s` is what the answer asked for: the wait is not shorter.

    >>> [pause_s("TooManyRequestsException", attempt, draw=lambda: 0.5) for attempt in range(5)]
    [0.1, 0.2, 0.4, 0.8, None]
    """
    first_s = failure(kind).pause_s
    return None if first_s is None or attempt >= RETRIES else retry_after_s + draw() * first_s * 2**attempt


def kind_of(error: Exception) -> str:
    """Name an exception's kind: AWS's error code if it has one, else its class.

    >>> kind_of(TimeoutError("no answer"))
    'TimeoutError'
    """
    response = getattr(error, "response", None) or {}  # botocore's connection errors have a response that is None
    return str(response.get("Error", {}).get("Code") or type(error).__name__)
