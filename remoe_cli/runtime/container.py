"""The program of a main function's container image, as SageMaker starts it: `docker run IMAGE serve`.

    REMOE_MAIN=s3://BUCKET/main/SHA256.json python -m remoe_cli.runtime.container serve

It listens on every interface of the container, on port 8080 or $SAGEMAKER_BIND_TO_PORT. GET /ping answers 200 within 2 s once the model is
loaded. POST /invocations answers within 60 s, or streams within 8 minutes. SIGTERM is followed by SIGKILL after 30 s.

Source: SageMaker developer guide, "Custom Inference Code with Hosting Services".
"""

from __future__ import annotations

import os
import sys

from remoe_cli import openmp
from remoe_cli.runtime import server
from remoe_cli.runtime.access import Door
from remoe_cli.runtime.limits import Limits
from remoe_cli.runtime.load_main import load_packaged

PORT = 8080
# Below 60 s and 8 minutes by what a token may take, and the way back. Plans keep the second one: rented_timeout_s of the catalog.
LIMITS = Limits(whole_s=54, streamed_s=468)


def main(arguments: list[str]) -> None:
    openmp.wait_briefly(os.environ)  # before torch is imported
    uri = os.environ.get("REMOE_MAIN")
    if arguments != ["serve"] or not uri:
        sys.exit("error: This program is started as 'serve', with REMOE_MAIN=s3://BUCKET/main/SHA256.json in its environment.")
    port = int(os.environ.get("SAGEMAKER_BIND_TO_PORT", PORT))
    # SageMaker says nowhere by which name it asks.
    server.run(lambda: load_packaged(uri), server.listen("0.0.0.0", port), Door(None), LIMITS)


if __name__ == "__main__":
    main(sys.argv[1:])
