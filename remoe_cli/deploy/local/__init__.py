"""The local twin of AWS Lambda: it runs functions on this machine as Lambda would.

The function code, AWS's own runtime client (awslambdaric) and the Invoke API are the real ones. Limits of memory, CPU, payload, timeout,
init and concurrency are enforced. The twin knows functions, not what they compute.

    target      the local target: from a plan to a running deployment
    lifecycle   start, status, logs and destroy of a deployment
    folder      the files of a deployment             place     where its processes run, and how they are found
    supervisor  the detached process that holds one deployment together
    main_server keeps the main server running         guard     who may ask the twin's servers
    front       the Invoke API on loopback            pool      the execution environments of one function
    instance    one execution environment             worker    a worker's environment, and why it ended
"""
