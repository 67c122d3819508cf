"""Ask a deployed model: from `remoe infer NAME --prompt TEXT` to its receipt, stage by stage.

1. The command. `cli/infer.command` picks the target (`cli/target.pick`). The target says where the main function takes requests
   (`Target.main_address`, deploy/target.py).

2. The client. `client.answer` sends the prompt over HTTP, to a Lambda function or to a SageMaker endpoint, and passes text on as it comes.

3. The main function. `app.make_app` (HTTP) or `lambda_main.handle` (Lambda) lets the request's API read it (api/). The one calls
   `MainFunction.answering` through a scheduler, which answers several requests at once (scheduler.py), the other `MainFunction.answer`.
   Before its first request the process loaded the non-expert weights and the local experts (`load_main.load`,
   `engine.start_engine`); on AWS it fetched them from S3 (`fetch.fetch`).

4. The engine. `Engine.sequence` begins an answer, whose tokens choose.py chooses, and a batch goes on with it and others step by step
   (batch.py, sequence.py). One hook replaces the experts of every MoE layer (model/experts.py): it calls the `Dispatcher` with the hidden
   states and the experts that the router chose.

   A request that comes after a pause first starts the functions that it will probably need (start_ahead.py).

5. Dispatch. `Dispatcher._send` packs the rows of remote experts into one batch for each expert function, or into more where replicas or
   the payload limit divide it (`dispatch.divide`). Threads send the batches while this thread computes the local experts.
   Remote experts that are kept in spare memory are computed here too (expert_cache.py).

6. One call. `calls.Caller` tries it, and again where `failures.FAILURES` says that the next try can differ and the budget allows it
   (budget.py). A slow call is made a second time (hedging.py). What no function answers, the main function computes (breaker.py,
   last_resort.py). `invoke.attempt` makes a try: it calls Lambda's Invoke API, and reads time and billing from Lambda's REPORT line.

7. The expert function. AWS Lambda, or the local twin (deploy/local/front.py, pool.py, instance.py), runs `function/handler.handle`: it
   reads the shard once (function/weights.py), computes the experts (function/expert_ffn.py), and packs the outputs (function/codec.py).

8. Back. The caller checks the answer, and the dispatcher adds the remote outputs to the local ones. After the last token,
   `receipt.make_receipt` adds up times, calls and cost (plan/cost/prices.py), of calls that requests share each its part (shares.py); a
   request that failed gets `receipt.failed_receipt`. The client bills a main function on Lambda by its REPORT line
   (`receipt.with_report`) and puts the predicted figures beside the measured ones; `cli/infer.show_receipt` prints both.

Besides: calibrate.py measures a deployment, so that plans predict it better; container.py is the program of the main function's image;
server_config.py is the file server.json, which says what a main function serves and calls.
"""
