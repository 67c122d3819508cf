"""What a main function can run on, whatever the target."""

from __future__ import annotations

from enum import StrEnum


class Endpoint(StrEnum):
    """Where the main function runs: a SageMaker instance, a Lambda function of a container image, or the user's own machine."""

    sagemaker = "sagemaker"
    aws_lambda = "lambda"
    none = "none"
