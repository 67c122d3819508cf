"""What runs inside one expert function: the remote experts of one MoE layer.

The folder stands alone: it imports nothing else of remoe, and no torch, transformers or boto3. So a cold start is the interpreter, numpy
and one matrix library. The folder is zipped as it is into the function's package.
"""

import time

ENTERED_S = time.perf_counter()  # before the imports of a cold start
