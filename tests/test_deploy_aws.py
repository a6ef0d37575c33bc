"""cluster.yaml through Ray's own launcher, against moto's EC2: what it starts, and what it makes beside that."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import botocore.exceptions
import pytest
import yaml
from moto import mock_aws

CLUSTER_YAML = Path(__file__).resolve().parents[1] / "cluster.yaml"
REGION = "us-west-2"
TRUST = '{"Version": "2012-10-17", "Statement": []}'


@pytest.fixture(scope="module")
def ec2() -> Iterator[Any]:
    """EC2 of an account that exists in this process only."""
    from ray.autoscaler._private.aws.utils import client_cache, resource_cache

    with pytest.MonkeyPatch.context() as environment, mock_aws():
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            environment.setenv(name, "for-moto")
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"):
            environment.delenv(name, raising=False)
        environment.setenv("AWS_DEFAULT_REGION", REGION)
        # Ray keeps its clients for the life of the process; those of another test belong to another account.
        client_cache.cache_clear()
        resource_cache.cache_clear()
        yield boto3.client("ec2", region_name=REGION)
    client_cache.cache_clear()
    resource_cache.cache_clear()


@pytest.fixture(scope="module")
def account(ec2: Any) -> dict[str, str]:
    """Placeholder -> what stands for it in this account: all that the header of cluster.yaml asks for."""
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{i}.0/24", AvailabilityZone=f"{REGION}{zone}")["Subnet"][
            "SubnetId"
        ]
        for i, zone in enumerate("ab")
    ]
    group = ec2.create_security_group(GroupName="own", Description="itself only", VpcId=vpc)["GroupId"]
    ec2.create_key_pair(KeyName="own")
    images = [image["ImageId"] for image in ec2.describe_images()["Images"][:2]]
    iam = boto3.client("iam", region_name=REGION)
    profiles = []
    for name in ("head", "worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=TRUST)
        profiles.append(iam.create_instance_profile(InstanceProfileName=name)["InstanceProfile"]["Arn"])
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return {
        "REPLACE_REGION": REGION,
        "REPLACE_KEY_NAME": "own",
        "REPLACE_PRIVATE_KEY": "~/.ssh/own.pem",
        "REPLACE_CPU_IMAGE": images[0],
        "REPLACE_GPU_IMAGE": images[1],
        "REPLACE_SUBNET_A": subnets[0],
        "REPLACE_SUBNET_B": subnets[1],
        "REPLACE_SECURITY_GROUP": group,
        "REPLACE_HEAD_PROFILE_ARN": profiles[0],
        "REPLACE_WORKER_PROFILE_ARN": profiles[1],
        "REPLACE_BUCKET": "own-results",
    }


@pytest.fixture(scope="module")
def written(account: dict[str, str]) -> dict[str, Any]:
    """The file as its user fills it in."""
    text = re.sub(r"REPLACE_[A-Z_]*[A-Z]", lambda match: account[match.group()], CLUSTER_YAML.read_text())
    return yaml.safe_load(text)


@dataclass(frozen=True)
class Beside:
    """What an account holds beside instances."""

    groups: dict[str, str]
    """Id -> its inbound rules, for security groups that are not a network's own."""
    roles: set[str]
    profiles: set[str]

    @classmethod
    def of(cls, ec2: Any) -> Beside:
        iam = boto3.client("iam", region_name=REGION)
        groups = [
            group for group in ec2.describe_security_groups()["SecurityGroups"] if group["GroupName"] != "default"
        ]
        return cls(
            groups={group["GroupId"]: repr(group["IpPermissions"]) for group in groups},
            roles={role["RoleName"] for role in iam.list_roles()["Roles"]},
            profiles={profile["Arn"] for profile in iam.list_instance_profiles()["InstanceProfiles"]},
        )


@dataclass(frozen=True)
class Launched:
    """The cluster as ``ray up`` resolves it, with one instance of every type."""

    config: dict[str, Any]
    instances: dict[str, dict[str, Any]]
    """Node type -> EC2's description."""
    before: Beside
    after: Beside


@pytest.fixture(scope="module")
def launched(written: dict[str, Any], ec2: Any) -> Launched:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    before = Beside.of(ec2)
    config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(copy.deepcopy(written)))
    validate_config(config)
    config = AWSNodeProvider.bootstrap_config(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    instances = {name: instance(ec2, launch(provider, config, name)) for name in config["available_node_types"]}
    return Launched(config, instances, before, Beside.of(ec2))


def launch(provider: Any, config: dict[str, Any], name: str) -> str:
    """The id of one new node of a type, as Ray's launcher starts it."""
    kind = "head" if name == config["head_node_type"] else "worker"
    node = config["available_node_types"][name]["node_config"]
    if kind == "head":
        node = config["head_node"] | node
    tags = {"ray-node-type": kind, "ray-user-node-type": name, "ray-node-name": f"ray-{kind}", "ray-launch-config": "x"}
    (started,) = provider.create_node(node, tags, 1)
    return str(started)


def instance(ec2: Any, node: str) -> dict[str, Any]:
    (reservation,) = ec2.describe_instances(InstanceIds=[node])["Reservations"]
    (found,) = reservation["Instances"]
    return found


def test_written_resources_are_those_of_the_machines(written: dict[str, Any], ec2: Any) -> None:
    nodes = {k: v for k, v in written["available_node_types"].items() if k != written["head_node_type"]}
    types = [node["node_config"]["InstanceType"] for node in nodes.values()]
    described = ec2.describe_instance_types(InstanceTypes=types)["InstanceTypes"]
    machines = {machine["InstanceType"]: machine for machine in described}
    for name, node in nodes.items():
        machine = machines[node["node_config"]["InstanceType"]]
        gpus = [gpu for gpu in machine.get("GpuInfo", {}).get("Gpus", []) if gpu["Manufacturer"] == "NVIDIA"]
        assert node["resources"].get("GPU", 0) == sum(gpu["Count"] for gpu in gpus), name
        assert node["resources"]["CPU"] == machine["VCpuInfo"]["DefaultVCpus"], name


def test_ray_adds_memory_and_the_kind_of_gpu_and_changes_nothing(launched: Launched, written: dict[str, Any]) -> None:
    for name, node in launched.config["available_node_types"].items():
        asked = written["available_node_types"][name]["resources"]
        assert asked.items() <= node["resources"].items(), name
        assert ("memory" in node["resources"]) == (name != "head")
        assert any(key.startswith("accelerator_type:") for key in node["resources"]) == ("GPU" in asked), name


def test_every_node_starts_in_our_network_with_our_image_and_role(
    launched: Launched, written: dict[str, Any], account: dict[str, str]
) -> None:
    for name, found in launched.instances.items():
        node = written["available_node_types"][name]
        assert found["InstanceType"] == node["node_config"]["InstanceType"]
        image = "REPLACE_GPU_IMAGE" if "GPU" in node["resources"] else "REPLACE_CPU_IMAGE"
        assert found["ImageId"] == account[image], name
        assert [group["GroupId"] for group in found["SecurityGroups"]] == [account["REPLACE_SECURITY_GROUP"]], name
        assert found["SubnetId"] in {account["REPLACE_SUBNET_A"], account["REPLACE_SUBNET_B"]}, name
        assert found["KeyName"] == "own", name
        profile = "REPLACE_HEAD_PROFILE_ARN" if name == "head" else "REPLACE_WORKER_PROFILE_ARN"
        assert found["IamInstanceProfile"]["Arn"] == account[profile], name
        assert found["MetadataOptions"]["HttpTokens"] == "required", name
        assert (found.get("InstanceLifecycle") == "spot") == ("_spot_" in name), name
        assert {"Key": "ray-cluster-name", "Value": "scaling-ray"} in found["Tags"], name


def test_nothing_is_made_beside_the_instances(launched: Launched, account: dict[str, str]) -> None:
    assert launched.after == launched.before
    assert launched.before.groups == {account["REPLACE_SECURITY_GROUP"]: "[]"}


def test_without_our_group_a_node_gets_rays_open_one(written: dict[str, Any], ec2: Any, launched: Launched) -> None:
    """What the file is written against; and the check above can fail."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    config = copy.deepcopy(written)
    del config["available_node_types"]["cpu_spot_c7a"]["node_config"]["SecurityGroupIds"]
    AWSNodeProvider.bootstrap_config(prepare_config(config))
    added = {group: rules for group, rules in Beside.of(ec2).groups.items() if group not in launched.after.groups}
    assert len(added) == 1 and "0.0.0.0/0" in "".join(added.values())


def test_where_one_zone_has_no_machine_the_other_is_asked(
    launched: Launched, account: dict[str, str], ec2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    asked: list[str] = []
    answer = botocore.client.BaseClient._make_api_call

    def without_capacity(self: Any, operation: str, request: dict[str, Any]) -> Any:
        if operation == "RunInstances":
            asked.append(request["SubnetId"])
            if request["SubnetId"] == asked[0]:
                error = {"Code": "InsufficientInstanceCapacity", "Message": "none left in this zone"}
                raise botocore.exceptions.ClientError({"Error": error}, operation)
        return answer(self, operation, request)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", without_capacity)
    provider = AWSNodeProvider(launched.config["provider"], launched.config["cluster_name"])
    started = launch(provider, launched.config, "gpu_spot_g6")
    assert set(asked) == {account["REPLACE_SUBNET_A"], account["REPLACE_SUBNET_B"]}
    assert instance(ec2, started)["SubnetId"] == asked[-1] != asked[0]
