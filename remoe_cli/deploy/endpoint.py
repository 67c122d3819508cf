"""The kinds of endpoint that run a main function."""

from __future__ import annotations

from enum import StrEnum


class Endpoint(StrEnum):
    """What runs the main function.

    sagemaker    a SageMaker endpoint
    aws_lambda   a Lambda function of a container image; on the local twin a function of this installation
    none         nothing; the user runs it with 'remoe serve'
    """

    sagemaker = "sagemaker"
    aws_lambda = "lambda"
    none = "none"
