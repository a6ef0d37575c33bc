"""cluster.yaml and deploy/gcp.yaml: Ray's schema takes them, the clouds take their nodes, nothing is open to the world.

Offline by construction: only schema files inside the installed packages are read, sockets are refused.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import psutil
import pytest
import yaml
from botocore.validate import ParamValidator

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTERS = {"aws": REPOSITORY / "cluster.yaml", "gcp": REPOSITORY / "deploy" / "gcp.yaml"}
PLACEHOLDER = re.compile(r"REPLACE_[A-Z_]*[A-Z]")

# SubnetIds is Ray's: its node provider picks one and sends it as SubnetId, beside the counts.
RAY_ONLY_KEYS = {"SubnetIds"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("this test must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(params=CLUSTERS)
def text(request: pytest.FixtureRequest) -> str:
    """A cluster's file, as its user finds it."""
    return CLUSTERS[request.param].read_text()


@pytest.fixture
def config(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)


@pytest.fixture
def aws() -> dict[str, Any]:
    return yaml.safe_load(CLUSTERS["aws"].read_text())


@pytest.fixture
def gcp() -> dict[str, Any]:
    return yaml.safe_load(CLUSTERS["gcp"].read_text())


@pytest.fixture(scope="module")
def ec2_model() -> Any:
    return botocore.session.Session().get_service_model("ec2")


def node_configs(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: node["node_config"] for name, node in config["available_node_types"].items()}


def workers(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}


def is_spot(node_config: dict[str, Any]) -> bool:
    """Whether a cloud may take the machine away, and then deletes it rather than stop it at a cost."""
    if "InstanceType" in node_config:
        market = node_config.get("InstanceMarketOptions")
        return market is not None and market == {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    scheduling = node_config["scheduling"]
    return scheduling["provisioningModel"] == "SPOT" and scheduling["instanceTerminationAction"] == "DELETE"


def machine_of(node_config: dict[str, Any]) -> str:
    """The cloud's name of the machine."""
    return str(node_config["InstanceType"] if "InstanceType" in node_config else node_config["machineType"])


def run_instances_errors(node_config: dict[str, Any], ec2_model: Any) -> list[str]:
    """Everything EC2's request model holds against a node: unknown keys, wrong types, unknown enum values."""
    request = {key: value for key, value in node_config.items() if key not in RAY_ONLY_KEYS}
    request |= {"SubnetId": node_config["SubnetIds"][0], "MinCount": 1, "MaxCount": 1}
    shape = ec2_model.operation_model("RunInstances").input_shape
    report = ParamValidator().validate(request, shape)
    return ([report.generate_report()] if report.has_errors() else []) + list(enum_errors(request, shape, ""))


def enum_errors(value: Any, shape: Any, where: str) -> Iterator[str]:
    """ParamValidator ignores enums, so ``InstanceType: m7i.hughe`` would only fail at launch."""
    if shape.type_name == "structure":
        for key in value.keys() & shape.members.keys():
            yield from enum_errors(value[key], shape.members[key], f"{where}.{key}")
    elif shape.type_name == "list":
        for i, item in enumerate(value):
            yield from enum_errors(item, shape.member, f"{where}[{i}]")
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield f"{where}: {value!r} is none of the model's values"


def open_doors(text: str) -> list[str]:
    """Addresses that mean "everyone", outside of comments."""
    code = "\n".join(line.split("#", 1)[0] for line in text.splitlines())
    return re.findall(r"0\.0\.0\.0(?:/0)?|::/0|(?<![\w:])::(?![\w:])", code)


def test_rays_own_schema_accepts_it(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    # What the defaults would have brought in: stopped nodes kept, an old boto3, a dashboard on every interface.
    assert prepared["provider"]["cache_stopped_nodes"] is False
    assert prepared["head_start_ray_commands"] == config["head_start_ray_commands"]
    assert prepared["worker_start_ray_commands"] == config["worker_start_ray_commands"]
    assert not open_doors(yaml.safe_dump(prepared))


def test_rays_schema_refuses_a_misspelt_key(config: dict[str, Any]) -> None:
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    config["idle_timeout_minuts"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config(config))


def test_ec2_accepts_every_node(aws: dict[str, Any], ec2_model: Any) -> None:
    for name, node_config in node_configs(aws).items():
        assert run_instances_errors(node_config, ec2_model) == [], name


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"InstanceTyp": "m7i.large"}, "InstanceTyp"),
        ({"SecurityGroupIds": "sg-1"}, "SecurityGroupIds"),
        ({"InstanceType": "m7i.hughe"}, "m7i.hughe"),
        ({"InstanceMarketOptions": {"MarketType": "spott"}}, "spott"),
    ],
)
def test_the_node_check_can_fail(aws: dict[str, Any], ec2_model: Any, change: dict[str, Any], complaint: str) -> None:
    node_config = next(iter(node_configs(aws).values())) | change
    assert complaint in " ".join(run_instances_errors(node_config, ec2_model))


def test_workers_come_from_zero_and_all_but_the_multi_gpu_ones_are_spot(config: dict[str, Any]) -> None:
    kinds = workers(config)
    for name, node in kinds.items():
        assert node["min_workers"] == 0, name
        assert node["max_workers"] > 0, name
        # A group over the GPUs of one machine is worth more than the discount.
        assert is_spot(node["node_config"]) == (node["resources"].get("GPU", 0) <= 1), name
    assert config["max_workers"] <= sum(node["max_workers"] for node in kinds.values())
    assert 0 < config["idle_timeout_minutes"] <= 30


def test_every_shape_has_a_second_type(config: dict[str, Any]) -> None:
    shapes: dict[tuple[float, float], set[str]] = {}
    for node in workers(config).values():
        shape = (node["resources"]["CPU"], node["resources"].get("GPU", 0))
        shapes.setdefault(shape, set()).add(machine_of(node["node_config"]))
    assert {gpus for _, gpus in shapes} == {0, 1, 4}
    assert all(len(types) >= 2 for types in shapes.values()), shapes


def test_the_head_is_on_demand_and_only_drives(config: dict[str, Any]) -> None:
    head = config["available_node_types"][config["head_node_type"]]
    assert not is_spot(head["node_config"])
    assert machine_of(head["node_config"])[0] not in {"a", "g", "p"}
    assert "GPU" not in head["resources"]
    assert head["max_workers"] == 0
    assert head["resources"]["CPU"] == 0
    assert type(head["resources"]["trial_driver"]) is int and head["resources"]["trial_driver"] >= 1
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])
    assert all("trial_driver" not in node["resources"] for node in workers(config).values())


def test_nothing_is_open(config: dict[str, Any], text: str) -> None:
    assert open_doors(text) == []
    assert config["provider"]["use_internal_ips"] is True
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_no_aws_node_leaves_its_network_or_its_role_to_a_default(aws: dict[str, Any]) -> None:
    # Ray's default group admits SSH from anywhere and its default role is full access to EC2 and S3: name our own.
    assert "security_group" not in aws["provider"]
    for name, node_config in node_configs(aws).items():
        for key in ("SecurityGroupIds", "SubnetIds", "ImageId", "IamInstanceProfile", "KeyName"):
            assert node_config.get(key), f"{name} leaves {key} to a default"
        assert len(set(node_config["SubnetIds"])) >= 2, f"{name} has no second zone"
        assert node_config["MetadataOptions"]["HttpTokens"] == "required", name
        assert node_config["MetadataOptions"]["HttpPutResponseHopLimit"] == 1, name
        assert all(disk["Ebs"]["Encrypted"] for disk in node_config["BlockDeviceMappings"]), name


GCP_MACHINES = {
    "n2-standard-4": (4, 0),
    "n2-standard-16": (16, 0),
    "n2d-standard-16": (16, 0),
    "c2d-standard-16": (16, 0),
    "g2-standard-8": (8, 1),
    "n1-standard-8": (8, 0),
    "g2-standard-48": (48, 4),
    "a2-highgpu-4g": (48, 4),
}
"""Machine -> its virtual CPUs and the GPUs that come with it, by Google's tables of machine families (2026)."""


def test_written_gcp_resources_are_those_of_the_machines(gcp: dict[str, Any]) -> None:
    for name, node in workers(gcp).items():
        cpus, gpus = GCP_MACHINES[node["node_config"]["machineType"]]
        added = sum(each["acceleratorCount"] for each in node["node_config"].get("guestAccelerators", []))
        assert (node["resources"]["CPU"], node["resources"].get("GPU", 0)) == (cpus, gpus + added), name


def test_no_gcp_node_leaves_its_network_or_its_role_to_a_default(gcp: dict[str, Any]) -> None:
    head = node_configs(gcp)[gcp["head_node_type"]]
    for name, node_config in node_configs(gcp).items():
        (interface,) = node_config["networkInterfaces"]
        assert interface.keys() == {"subnetwork"}, f"{name}: accessConfigs are an external address"
        (account,) = node_config["serviceAccounts"]
        assert (account == head["serviceAccounts"][0]) == (node_config is head), name
        assert node_config["tags"] == {"items": ["scaling-ray"]}, name
        assert {"key": "block-project-ssh-keys", "value": "true"} in node_config["metadata"]["items"], name
        (disk,) = node_config["disks"]
        assert disk["boot"] and disk["autoDelete"] and disk["initializeParams"]["sourceImage"], name
        has_gpus = "GPU" in gcp["available_node_types"][name]["resources"]
        image = "REPLACE_GPU_IMAGE" if has_gpus else "REPLACE_CPU_IMAGE"
        assert disk["initializeParams"]["sourceImage"] == image, name
        if has_gpus or is_spot(node_config):
            # The API refuses such machines with any other policy.
            assert node_config["scheduling"]["onHostMaintenance"] == "TERMINATE", name


def test_both_clouds_offer_the_same_shapes_and_run_the_same_commands(aws: dict[str, Any], gcp: dict[str, Any]) -> None:
    def shapes(config: dict[str, Any]) -> set[str]:
        return {repr(sorted(node["resources"].items())) for node in config["available_node_types"].values()}

    def started(config: dict[str, Any], commands: str) -> list[str]:
        return [re.sub(r"AWS_DEFAULT_REGION=\S+ |SCALING_RAY_OUT=\S+", "", command) for command in config[commands]]

    assert shapes(aws) == shapes(gcp)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert started(aws, commands) == started(gcp, commands)
    without_mount = [command for command in gcp["setup_commands"] if "mount" not in command]
    assert without_mount == aws["setup_commands"]
    assert {key: aws[key] for key in ("file_mounts", "rsync_exclude", "max_workers", "idle_timeout_minutes")} == {
        key: gcp[key] for key in ("file_mounts", "rsync_exclude", "max_workers", "idle_timeout_minutes")
    }


def test_results_lie_where_every_node_reads_them(aws: dict[str, Any], gcp: dict[str, Any]) -> None:
    (place,) = re.findall(r"SCALING_RAY_OUT=([^\s;]+)", " ".join(aws["head_start_ray_commands"]))
    assert place.startswith("s3://")
    (place,) = re.findall(r"SCALING_RAY_OUT=([^\s;]+)", " ".join(gcp["head_start_ray_commands"]))
    (mount,) = [command for command in gcp["setup_commands"] if "mount -t nfs" in command]
    assert place.startswith(mount.rstrip(")").split()[-1] + "/")


@pytest.mark.parametrize(
    "line", ["--dashboard-host=0.0.0.0", "CidrIp: 0.0.0.0/0", "CidrIpv6: '::/0'", "--dashboard-host ::"]
)
def test_the_open_door_check_can_fail(line: str) -> None:
    assert open_doors(f"# 0.0.0.0/0 in a comment is fine\n{line}\n")


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_ray_start_asks_for_the_token(config: dict[str, Any], commands: str) -> None:
    starts = [command for command in config[commands] if "ray start" in command]
    assert len(starts) == 1
    before, _, _ = starts[0].partition("ray start")
    assert re.search(r"export [^;]*\bRAY_AUTH_MODE=token\b", before)


def test_the_token_is_a_file_and_never_a_word_of_the_config(config: dict[str, Any], text: str) -> None:
    assert "RAY_AUTH_TOKEN=" not in text
    (remote,) = [remote for remote, local in config["file_mounts"].items() if local == "~/.ray/auth_token"]
    assert remote == f"/home/{config['auth']['ssh_user']}/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"][0]


def test_nodes_install_the_committed_constraints(config: dict[str, Any]) -> None:
    (remote,) = [remote for remote, local in config["file_mounts"].items() if local == "constraints.txt"]
    assert (REPOSITORY / "constraints.txt").is_file()
    assert any(f"pip install -r ~/{Path(remote).name}" in command for command in config["setup_commands"])


def test_files_that_are_copied_to_the_nodes_are_there(config: dict[str, Any]) -> None:
    for local in config["file_mounts"].values():
        assert local.startswith("~/.ray/") or (REPOSITORY / local).exists(), local


def test_nodes_install_the_package_they_were_given(aws: dict[str, Any], tmp_path: Path) -> None:
    """The copied files suffice for pip to build the package, and its command line is there."""
    home = f"/home/{aws['auth']['ssh_user']}/scaling-ray/"
    for remote, local in aws["file_mounts"].items():
        if remote.startswith(home):
            source, target = REPOSITORY / local, tmp_path / "source" / remote.removeprefix(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_of = shutil.copytree if source.is_dir() else shutil.copyfile
            copy_of(source, target)
    assert any(
        command.endswith("/pip install --no-deps --no-build-isolation ~/scaling-ray")
        for command in aws["setup_commands"]
    )
    install = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", *install, "--target", tmp_path / "there", tmp_path / "source"],
        check=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert (tmp_path / "there" / "bin" / "scaling-ray").is_file()
    assert (tmp_path / "there" / "scaling_ray" / "report" / "template.html").is_file()


def as_rays_shell(command: str, home: Path) -> None:
    """Run a command as Ray does on a node: in an interactive login shell that ends at once."""
    wrapped = f"true && source ~/.bashrc && (export RAY_HEAD_IP=10.0.0.1; {command})"
    subprocess.run(
        ["bash", "--login", "-c", "-i", wrapped],
        env={"HOME": str(home), "PATH": os.environ["PATH"]},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=30,
        check=True,
    )


def test_the_watcher_outlives_the_shell_that_starts_it_and_replaces_an_earlier_one(
    config: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / ".bashrc").touch()
    program = tmp_path / "scaling-ray-env" / "bin" / "scaling-ray"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$1 as $RAY_AUTH_MODE"\nexec sleep 60\n')
    program.chmod(0o755)
    (watch,) = [command for command in config["worker_start_ray_commands"] if "node-watch" in command]
    assert not any("node-watch" in command for command in config["head_start_ray_commands"])
    watchers = []
    try:
        for starts in (1, 2):
            as_rays_shell(watch, tmp_path)
            watchers.append(psutil.Process(int((tmp_path / "node-watch.pid").read_text())))
            deadline = time.monotonic() + 20
            while watchers[-1].name() != "sleep" and time.monotonic() < deadline:
                time.sleep(0.05)
            assert watchers[-1].name() == "sleep"
            assert (tmp_path / "node-watch.log").read_text().splitlines() == ["node-watch as token"] * starts
        first, second = watchers
        psutil.wait_procs([first], timeout=10)
        assert not first.is_running() or first.status() == psutil.STATUS_ZOMBIE
        assert second.is_running() and second.status() != psutil.STATUS_ZOMBIE
    finally:
        for watcher in watchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                watcher.kill()


def test_every_placeholder_is_explained_and_used(text: str) -> None:
    header, _, body = text.partition("cluster_name:")
    explained = set(re.findall(rf"^#   ({PLACEHOLDER.pattern})\s+\S", header, flags=re.M))
    used = set(PLACEHOLDER.findall(body))
    assert used == explained
    # and what must differ per account is nothing but placeholders: no one's real ids slip in
    assert not re.findall(r"\b(?:ami|subnet|sg|vpc)-[0-9a-f]{8,}|arn:aws|\b\d{12}\b", body)
