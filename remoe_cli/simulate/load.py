"""What a way of serving is given, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass

from remoe_cli.plan.arrays import Bools, Floats, Ints


@dataclass(frozen=True)
class Load:
    """The requests that a deployment takes, in the order of time.

    at_s        float64 [N]: when they come
    n_in        int64 [N]: prompt tokens
    prompt_s    float64 [N]: reading the prompt, warm and alone
    prompt_usd  float64 [N]: expert functions meanwhile
    tpot_s      float64 [N]: a further token of a request that is served alone
    n_out       int64 [N]: tokens after the first
    cold_s      float64 [N]: what starting the expert functions takes, if this request has to wait for it
    over_s      how long the traffic goes on
    """

    at_s: Floats
    n_in: Ints
    prompt_s: Floats
    prompt_usd: Floats
    tpot_s: Floats
    n_out: Ints
    cold_s: Floats
    over_s: float


@dataclass(frozen=True)
class Times:
    """When requests were answered, and what was used for that.

    first_s, end_s    float64 [N]: when the first token and the last one came, had nobody ended the answer
    cold, taken, answered    bool [N]: requests that waited for a start; that were not refused; and that had their whole answer
    main_starts, function_starts    how many
    up_s, paid_s      seconds in which rented instances are up, and in which instances that are paid by use answer
    functions_usd     expert functions, without their starts
    """

    first_s: Floats
    end_s: Floats
    cold: Bools
    taken: Bools
    answered: Bools
    main_starts: int
    function_starts: int
    up_s: float
    paid_s: float
    functions_usd: float
