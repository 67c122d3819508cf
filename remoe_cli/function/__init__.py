"""What runs inside one expert function: the remote experts of one MoE layer.

Self-contained: it imports nothing of remoe outside this folder, and no torch, transformers or boto3, so that a cold
start is an interpreter, numpy and one matrix library. The folder is zipped as it is into the function's package.
"""

import time

ENTERED_S = time.perf_counter()  # before anything of the function is imported: where a cold start's imports begin
