"""A cluster is judged by what it can become: which bundles its nodes can hold at once, from its description alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from scaling_ray.errors import BadInput
from scaling_ray.sweep.capacity import UNBOUNDED, Capacity, NodeType

SPOT = Capacity(
    (
        NodeType("head", {"CPU": 0.0, "trial_driver": 64.0}, 1),
        NodeType("cpu", {"CPU": 16.0}, 4),
        NodeType("gpu", {"CPU": 8.0, "GPU": 2.0}, 2),
    )
)

CLUSTER = """
max_workers: 24
head_node_type: head
available_node_types:
    head: {resources: {CPU: 0, trial_driver: 64}, max_workers: 0}
    cpu_spot: {resources: {CPU: 16}, max_workers: 16}
    gpu_spot: {resources: {CPU: 8, GPU: 1}, max_workers: 8}
"""


def cluster_file(folder: Path, text: str = CLUSTER) -> Path:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_totals_are_of_all_nodes_at_their_most() -> None:
    assert SPOT.total("CPU") == 4 * 16 + 2 * 8
    assert SPOT.total("GPU") == 4
    assert SPOT.total("trial_driver") == 64
    assert SPOT.total("TPU") == 0
    assert SPOT.largest("GPU") == 2


def test_a_bound_on_all_nodes_together_bounds_totals_and_placements() -> None:
    few = Capacity(SPOT.nodes, most_nodes=3)
    assert few.total("CPU") == 3 * 16
    assert few.fits([{"CPU": 16}] * 3) and not few.fits([{"CPU": 16}] * 4)
    assert few.fits([{"trial_driver": 1}, {"CPU": 8, "GPU": 1}, {"CPU": 16}])
    assert not few.fits([{"trial_driver": 1}, {"CPU": 8, "GPU": 1}, {"CPU": 16}, {"CPU": 16}])


@pytest.mark.parametrize(
    ("bundles", "fits"),
    [
        ([], True),
        ([{"CPU": 16}] * 4, True),
        ([{"CPU": 16}] * 5, False),
        ([{"CPU": 17}], False),
        ([{"CPU": 8}] * 10, True),
        ([{"CPU": 8}] * 11, False),
        # CPU bundles leave the nodes with GPUs to those who need them, in whatever order they are named
        ([{"CPU": 16}] * 4 + [{"CPU": 1, "GPU": 1}] * 4, True),
        ([{"CPU": 1, "GPU": 1}] * 4 + [{"CPU": 16}] * 4, True),
        ([{"CPU": 1, "GPU": 1}] * 5, False),
        ([{"CPU": 1, "GPU": 2}] * 2, True),
        ([{"CPU": 1, "GPU": 3}], False),
        ([{"CPU": 5, "GPU": 1}] * 3, False),
        # a share is of one GPU: three of two thirds need three GPUs
        ([{"CPU": 1, "GPU": 1 / 3}] * 12, True),
        ([{"CPU": 1, "GPU": 1 / 3}] * 13, False),
        ([{"CPU": 0, "GPU": 2 / 3}] * 4, True),
        ([{"CPU": 0, "GPU": 2 / 3}] * 5, False),
        ([{"CPU": 0.5, "GPU": 0.125}] * 16 + [{"CPU": 0, "GPU": 2}], True),
        ([{"CPU": 0, "GPU": 0.125}] * 17 + [{"CPU": 0, "GPU": 2}], False),
        ([{"trial_driver": 1}] * 64, True),
        ([{"trial_driver": 1}] * 65, False),
        ([{"trial_driver": 1}, *[{"CPU": 8, "GPU": 2}] * 2], True),
        ([{"TPU": 1}], False),
    ],
)
def test_what_the_nodes_hold_at_once(bundles: list[dict[str, float]], fits: bool) -> None:
    assert SPOT.fits(bundles) is fits


def test_one_machine() -> None:
    machine = Capacity.local(2, 1)
    assert machine.total("CPU") == 2 and machine.total("GPU") == 1
    assert machine.fits([{"CPU": 1}, {"CPU": 1, "GPU": 1}])
    assert not machine.fits([{"CPU": 1}, {"CPU": 2}])
    assert not Capacity.local(2).fits([{"CPU": 1, "GPU": 0.5}])


def test_a_kind_of_node_without_bound_holds_anything_that_fits_one_node() -> None:
    nodes = Capacity((NodeType("any", {"CPU": 4.0}, UNBOUNDED),))
    assert nodes.fits([{"CPU": 3}] * 500)
    assert not nodes.fits([{"CPU": 5}])


def held_by_search(nodes: list[tuple[float, float]], bundles: list[tuple[float, float]]) -> bool:
    """Whether any assignment of whole-GPU bundles to nodes holds them all: tried one after the other."""
    for places in itertools.product(range(len(nodes)), repeat=len(bundles)):
        loads = [[0.0, 0.0] for _ in nodes]
        for place, (cpus, gpus) in zip(places, bundles, strict=True):
            loads[place][0] += cpus
            loads[place][1] += gpus
        if all(cpu <= node[0] and gpu <= node[1] for (cpu, gpu), node in zip(loads, nodes, strict=True)):
            return True
    return False


def test_no_placement_is_invented_and_hardly_one_is_missed() -> None:
    draw, missed, possible = random.Random(0), 0, 0
    for _ in range(300):
        nodes = [(float(draw.randint(2, 8)), float(draw.randint(0, 2))) for _ in range(3)]
        bundles = [(float(draw.randint(1, 4)), float(draw.choice((0, 0, 1)))) for _ in range(5)]
        capacity = Capacity(tuple(NodeType(f"n{i}", {"CPU": c, "GPU": g}, 1) for i, (c, g) in enumerate(nodes)))
        found = capacity.fits([{"CPU": cpus, "GPU": gpus} for cpus, gpus in bundles])
        truth = held_by_search(nodes, bundles)
        assert truth or not found, (nodes, bundles)
        possible, missed = possible + truth, missed + (truth and not found)
    assert possible > 100 and missed <= 0.05 * possible


def test_equal_bundles_are_placed_exactly() -> None:
    draw = random.Random(1)
    for _ in range(100):
        nodes = [(float(draw.randint(1, 9)), float(draw.randint(0, 3))) for _ in range(3)]
        cpus, gpus = float(draw.randint(1, 3)), float(draw.randint(0, 2))
        most = sum(int(min(c // cpus, g // gpus if gpus else c // cpus)) for c, g in nodes)
        capacity = Capacity(tuple(NodeType(f"n{i}", {"CPU": c, "GPU": g}, 1) for i, (c, g) in enumerate(nodes)))
        assert capacity.fits([{"CPU": cpus, "GPU": gpus}] * most)
        assert not capacity.fits([{"CPU": cpus, "GPU": gpus}] * (most + 1))


def test_a_cluster_file_says_what_it_can_become(tmp_path: Path) -> None:
    capacity = Capacity.of_file(cluster_file(tmp_path))
    assert {node.name: node.count for node in capacity.nodes} == {"head": 1, "cpu_spot": 16, "gpu_spot": 8}
    assert capacity.total("CPU") == 16 * 16 + 8 * 8 and capacity.total("GPU") == 8
    assert capacity.fits([{"trial_driver": 1}, *[{"CPU": 8, "GPU": 1}] * 8])
    assert "16 cpu_spot (CPU 16)" in capacity.described()
    bounded = Capacity.of_file(cluster_file(tmp_path, CLUSTER.replace("max_workers: 24", "max_workers: 10")))
    assert bounded.total("CPU") == 11 * 16  # ten workers, or eleven nodes with the head: never fewer than Ray starts
    unsaid = CLUSTER.replace("{resources: {CPU: 16}, max_workers: 16}", "{resources: {CPU: 16}}")
    assert {node.name: node.count for node in Capacity.of_file(cluster_file(tmp_path, unsaid)).nodes}["cpu_spot"] == 24


def test_resources_that_a_cloud_would_tell_come_from_what_is_known(tmp_path: Path) -> None:
    path = cluster_file(tmp_path, CLUSTER.replace("{CPU: 16}", "{}"))
    with pytest.raises(BadInput, match=r"available_node_types.cpu_spot.resources: {}: says no CPU; .*prices.nodes"):
        Capacity.of_file(path)
    known = Capacity.of_file(path, {"cpu_spot": {"CPU": 32.0}, "gpu_spot": {"CPU": 99.0}})
    assert {node.name: node.offers("CPU") for node in known.nodes} == {"head": 0, "cpu_spot": 32, "gpu_spot": 8}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "--cluster: .*cannot be read as YAML"),
        ("- 1", "has no available_node_types"),
        ("available_node_types: {}", "has no available_node_types"),
        ("available_node_types: {cpu: 3}", "available_node_types.cpu: 3: is no table"),
        ("available_node_types: {cpu: {resources: {CPU: 2}}}", "max_workers: None: is missing"),
        ("available_node_types: {cpu: {resources: {CPU: 2}, max_workers: -1}}", "-1: must be a whole number"),
        ("available_node_types: {cpu: {resources: {CPU: many}, max_workers: 1}}", "must be a table of amounts"),
    ],
)
def test_a_file_that_describes_no_cluster_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        Capacity.of_file(cluster_file(tmp_path, text))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--cluster: '.*none.yaml': cannot be read"):
        Capacity.of_file(tmp_path / "none.yaml")
