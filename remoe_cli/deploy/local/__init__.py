"""An embedded twin of AWS Lambda on one machine.

The function code, AWS's own runtime client (awslambdaric) and the Invoke API are the real ones; memory, CPU, payload,
timeout, init and concurrency limits are enforced. The twin knows functions, not what they compute.

    lifecycle   what the command line calls: start, status, logs, destroy
    supervisor  the detached process that holds one deployment together
    front       the Invoke API on loopback            pool      the execution environments of one function
    instance    one execution environment             worker    what a worker is given, and why it ended
"""
