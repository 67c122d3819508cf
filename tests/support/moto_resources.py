"""Resources of CloudFormation that moto does not know: an alias, and a capacity provider."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from moto.awslambda.exceptions import UnknownFunctionException
from moto.awslambda.models import lambda_backends
from moto.core.common_models import CloudFormationModel


class Alias(CloudFormationModel):
    __module__ = "moto.awslambda.models"  # moto finds a model's service in it

    def __init__(self, function: str, name: str) -> None:
        self.function, self.name = function, name

    @property
    def physical_resource_id(self) -> str:
        return f"{self.function}:{self.name}"

    @staticmethod
    def cloudformation_name_type() -> str:
        return ""

    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::Lambda::Alias"

    @classmethod
    def create_from_cloudformation_json(  # type: ignore[override]
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **kwargs: Any
    ) -> Alias:
        wanted = cloudformation_json["Properties"]
        lambda_backends[account_id][region_name].create_alias(
            name=wanted["Name"],
            function_name=wanted["FunctionName"],
            function_version=str(wanted["FunctionVersion"]),
            description="",
            routing_config="",
        )
        return cls(wanted["FunctionName"], wanted["Name"])

    @classmethod
    def update_from_cloudformation_json(  # type: ignore[override]
        cls, original_resource: Alias, new_resource_name: str, cloudformation_json: Any, account_id: str, region_name: str
    ) -> Alias:
        wanted = cloudformation_json["Properties"]
        lambda_backends[account_id][region_name].update_alias(
            name=wanted["Name"],
            function_name=wanted["FunctionName"],
            function_version=str(wanted["FunctionVersion"]),
            description=None,
            routing_config=None,
        )
        return original_resource

    def delete(self, account_id: str, region: str) -> None:
        with suppress(UnknownFunctionException):
            lambda_backends[account_id][region].delete_alias(name=self.name, function_name=self.function)


class CapacityProvider(CloudFormationModel):
    """A capacity provider that is there and launches nothing: it has an ARN, which functions name."""

    __module__ = "moto.awslambda.models"

    def __init__(self, name: str, account_id: str, region: str) -> None:
        self.name, self.arn = name, f"arn:aws:lambda:{region}:{account_id}:capacity-provider:{name}"

    @property
    def physical_resource_id(self) -> str:
        return self.name

    @staticmethod
    def cloudformation_name_type() -> str:
        return ""

    @staticmethod
    def cloudformation_type() -> str:
        return "AWS::Lambda::CapacityProvider"

    @classmethod
    def has_cfn_attr(cls, attr: str) -> bool:
        return attr == "Arn"

    def get_cfn_attribute(self, attribute_name: str) -> str:
        return self.arn

    @classmethod
    def create_from_cloudformation_json(  # type: ignore[override]
        cls, resource_name: str, cloudformation_json: Any, account_id: str, region_name: str, **kwargs: Any
    ) -> CapacityProvider:
        if not cloudformation_json["Properties"]["VpcConfig"]["SubnetIds"]:
            raise ValueError("a capacity provider needs a subnet")
        return cls(resource_name, account_id, region_name)

    def delete(self, account_id: str, region: str) -> None:
        pass
