"""deploy/kuberay: the operator's schemas take it, Ray reads it as it is meant, and our own rules hold for its pods."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
MANIFESTS = REPOSITORY / "deploy" / "kuberay"
PLACEHOLDER = re.compile(r"REPLACE_[A-Z_]*[A-Z]")
SCHEMAS = Path(os.environ.get("KUBERAY_SCHEMAS", REPOSITORY.parent / "shared" / "kuberay"))
"""Schemas of KubeRay 1.7's resources, as <kind>.v1.7.0.schema.json; they are not part of the repository."""

OWN_LABEL = {"app": "scaling-ray"}
DRAIN_SECONDS = 75


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((MANIFESTS / f"{name}.yaml").read_text()))


def cluster() -> dict[str, Any]:
    (found,) = documents("raycluster")
    return found


def job() -> dict[str, Any]:
    (found,) = documents("rayjob")
    return found


def pods(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(group, pod template) of a cluster's spec, the head first."""
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def pod_complaints(group: str, template: dict[str, Any]) -> list[str]:
    """What a pod of ours must not be, one line each."""
    spec, found = template["spec"], []
    if template["metadata"]["labels"] != OWN_LABEL:
        found.append("no policy lets it talk")
    if spec["restartPolicy"] != "Never":
        found.append("autoscaler v2 replaces pods, a restarted one it does not know")
    user = spec["securityContext"]
    if not (user["runAsNonRoot"] and user["runAsUser"] > 0 and user["seccompProfile"] == {"type": "RuntimeDefault"}):
        found.append("runs as root")
    for container in spec["containers"]:
        resources = container["resources"]
        if resources["requests"] != resources["limits"] or not {"cpu", "memory"} <= resources["limits"].keys():
            found.append(f"{container['name']}: requests are not limits")
        closed = container["securityContext"]
        if closed != {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}:
            found.append(f"{container['name']}: may gain privileges")
        if any("hostPort" in port for port in container.get("ports", [])):
            found.append(f"{container['name']}: opens a port of the node")
    if spec.get("hostNetwork"):
        found.append("is on the node's network")
    if group != "head" and spec.get("automountServiceAccountToken") is not False:
        found.append("holds a key to the Kubernetes API")
    return found


def worker_complaints(template: dict[str, Any]) -> list[str]:
    """What a worker must do when it has to go."""
    spec, found = template["spec"], []
    if spec["terminationGracePeriodSeconds"] < max(90, DRAIN_SECONDS + 10):
        found.append("is killed before it has saved")
    (container,) = spec["containers"]
    command = " ".join(container["lifecycle"]["preStop"]["exec"]["command"])
    drain = re.search(
        r"ray drain-node --reason=DRAIN_NODE_REASON_PREEMPTION .*--deadline-remaining-seconds=(\d+)", command
    )
    if drain is None or f"&& sleep {drain.group(1)}" not in command or int(drain.group(1)) != DRAIN_SECONDS:
        found.append("is not drained and waited for")
    return found


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob"])
def test_the_operators_schema_takes_it(kind: str) -> None:
    import jsonschema

    path = SCHEMAS / f"{kind}.v1.7.0.schema.json"
    if not path.is_file():
        pytest.skip(f"no schema at {path}; KUBERAY_SCHEMAS names their folder")
    schema = json.loads(path.read_text())
    manifest = cluster() if kind == "RayCluster" else job()
    jsonschema.validate(manifest, schema)
    wrong = copy.deepcopy(manifest)
    wrong["spec"]["enableAutoscaling"] = True
    with pytest.raises(jsonschema.ValidationError, match="enableAutoscaling"):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize("spec", [cluster()["spec"], job()["spec"]["rayClusterSpec"]], ids=["RayCluster", "RayJob"])
def test_ray_reads_the_same_shapes_as_on_the_clouds(spec: dict[str, Any]) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    types = _generate_available_node_types_from_ray_cr_spec(spec)
    head = types.pop("headgroup")
    assert (head["resources"]["CPU"], head["resources"]["trial_driver"]) == (0, 64)
    assert head["max_workers"] == 0
    assert {types[name]["resources"].get("GPU", 0) for name in types} == {0, 1, 4}
    for name, worker in types.items():
        assert worker["min_workers"] == 0 < worker["max_workers"], name
        assert worker["resources"]["CPU"] >= 1 and "trial_driver" not in worker["resources"], name
        assert worker["resources"]["memory"] >= 2**30, name


def test_the_cluster_scales_by_version_2_from_zero_and_asks_for_the_token() -> None:
    from importlib.metadata import version

    spec = cluster()["spec"]
    assert spec["rayVersion"] == version("ray")
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["autoscalerOptions"]["resources"]["requests"] == spec["autoscalerOptions"]["resources"]["limits"]
    assert all(group["replicas"] == group["minReplicas"] == 0 for group in spec["workerGroupSpecs"])
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    head = {each["name"]: each["value"] for each in spec["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    assert head["SCALING_RAY_OUT"].startswith("s3://") and int(head["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
    assert "0.0.0.0" not in (MANIFESTS / "raycluster.yaml").read_text()


def test_a_jobs_cluster_is_that_of_the_cluster_manifest() -> None:
    assert job()["spec"]["rayClusterSpec"] == cluster()["spec"]


def test_pods_keep_our_rules() -> None:
    for group, template in pods(cluster()["spec"]):
        assert pod_complaints(group, template) == [], group
        if group != "head":
            assert worker_complaints(template) == [], group
    assert pod_complaints("submitter", job()["spec"]["submitterPodTemplate"]) == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda pod: pod["metadata"]["labels"].clear(), "no policy"),
        (lambda pod: pod["spec"].update(restartPolicy="Always"), "autoscaler v2"),
        (lambda pod: pod["spec"]["securityContext"].update(runAsUser=0), "as root"),
        (lambda pod: pod["spec"]["containers"][0]["resources"]["limits"].update(memory="64Gi"), "requests are not"),
        (lambda pod: pod["spec"]["containers"][0]["securityContext"].update(privileged=True), "gain privileges"),
        (
            lambda pod: pod["spec"]["containers"][0].update(ports=[{"containerPort": 1, "hostPort": 1}]),
            "port of the node",
        ),
        (lambda pod: pod["spec"].update(hostNetwork=True), "node's network"),
        (lambda pod: pod["spec"].update(automountServiceAccountToken=True), "key to the Kubernetes API"),
        (lambda pod: pod["spec"].update(terminationGracePeriodSeconds=60), "before it has saved"),
        (
            lambda pod: pod["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"].update(command=["ray", "stop"]),
            "not drained",
        ),
    ],
)
def test_the_rules_for_pods_can_fail(change: Callable[[dict[str, Any]], Any], complaint: str) -> None:
    template = copy.deepcopy(cluster()["spec"]["workerGroupSpecs"][0]["template"])
    change(template)
    assert any(complaint in line for line in pod_complaints("cpu-spot", template) + worker_complaints(template))


def test_only_what_may_be_lost_goes_to_spot_nodes_and_only_gpu_pods_to_gpu_nodes() -> None:
    spot = {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "spot"}
    for group, template in pods(cluster()["spec"]):
        keys = {each["key"] for each in template["spec"].get("tolerations", [])}
        gpus = int(template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))
        assert (spot <= keys) == ("spot" in group) == (group != "head" and gpus <= 1), group
        assert bool(keys & spot) == (spot <= keys), group
        assert ("nvidia.com/gpu" in keys) == (gpus > 0), group


def test_a_job_is_tried_once_ends_in_time_and_takes_its_cluster_with_it() -> None:
    found = job()
    spec = found["spec"]
    assert spec["backoffLimit"] == 0 and spec["submitterConfig"]["backoffLimit"] == 0
    assert spec["activeDeadlineSeconds"] > spec["preRunningDeadlineSeconds"] > 0
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    # A name of its own each time: the name of a job that was is refused.
    assert "name" not in found["metadata"] and found["metadata"]["generateName"]
    assert "jobId" not in spec
    words = spec["entrypoint"].split()
    assert words[0] == "python" and (REPOSITORY / words[1].removeprefix("/home/ray/scaling-ray/")).is_file()
    assert words[words.index("--out") + 1].startswith("s3://")


def test_nobody_talks_to_the_cluster_but_its_own_pods_and_the_operator() -> None:
    policies = {
        each["metadata"]["name"]: each["spec"] for each in documents("access") if each["kind"] == "NetworkPolicy"
    }
    nothing = policies.pop("deny-all")
    assert nothing == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    own, operator = policies.pop("scaling-ray"), policies.pop("operator-to-head")
    assert policies == {}
    among_us = {"podSelector": {"matchLabels": OWN_LABEL}}
    assert own["podSelector"] == among_us["podSelector"]
    assert own["ingress"] == [{"from": [among_us]}]
    assert {"to": [among_us]} in own["egress"]
    # To the world over TLS only: the metadata service of a cloud, which hands out credentials, answers plain HTTP.
    assert [rule for rule in own["egress"] if "to" not in rule] == [{"ports": [{"protocol": "TCP", "port": 443}]}]
    (rule,) = operator["ingress"]
    assert operator["podSelector"]["matchLabels"] == OWN_LABEL | {"ray.io/node-type": "head"}
    assert rule["ports"] == [{"protocol": "TCP", "port": 8265}] and len(rule["from"]) == 1


def test_head_and_workers_have_accounts_of_their_own() -> None:
    accounts = {each["metadata"]["name"] for each in documents("access") if each["kind"] == "ServiceAccount"}
    named = {group: template["spec"]["serviceAccountName"] for group, template in pods(cluster()["spec"])}
    assert set(named.values()) == accounts
    assert named.pop("head") not in named.values()


@pytest.mark.parametrize("name", ["access", "raycluster", "rayjob"])
def test_every_placeholder_is_explained_and_used(name: str) -> None:
    header, _, body = (MANIFESTS / f"{name}.yaml").read_text().partition("apiVersion:")
    explained = set(re.findall(rf"^#   ({PLACEHOLDER.pattern})\s+\S", header, flags=re.M))
    assert set(PLACEHOLDER.findall(body)) == explained
    assert not re.findall(r"arn:aws|\b\d{12}\b", body)
