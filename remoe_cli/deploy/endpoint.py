"""The kinds of endpoint that run a main function."""

from __future__ import annotations

from enum import StrEnum


class Endpoint(StrEnum):
    """What runs the main function.

    sagemaker    a SageMaker endpoint
    aws_lambda   a Lambda function of a container image; on the local twin a function of this installation
    lambda_gpu   a Lambda function of a container image on a GPU instance that scales to zero (Lambda Managed Instances)
    none         nothing; the user runs it with 'remoe serve'
    """

    sagemaker = "sagemaker"
    aws_lambda = "lambda"
    lambda_gpu = "lambda-gpu"
    none = "none"

    @property
    def on_lambda(self) -> bool:
        """Whether the main function is a Lambda function."""
        return self in (Endpoint.aws_lambda, Endpoint.lambda_gpu)
