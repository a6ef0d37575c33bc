"""The one reader: bad input named, values checked, and the same cells over S3 as from the disk."""

from __future__ import annotations

import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import boto3
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse as sp
import tiledbsoma as soma

from scaling_ray.census.layout import OBS_STRING_COLUMNS, CensusWriter, Dataset
from scaling_ray.census.source import Census
from scaling_ray.errors import BadInput
from scaling_ray.planted.plant import plant

CELLS, GENES = 2200, 120


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plant(tmp_path_factory.mktemp("source") / "census", n_cells=CELLS, n_genes=GENES)


@pytest.fixture(scope="module")
def s3_service() -> Iterator[str]:
    # a process of its own: TileDB holds the interpreter's lock while it waits for an answer
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=20)


def write_small(out: Path, values: Sequence[Sequence[float]], n_cells: int = 4) -> Path:
    """A Census of four cells and three genes with the given csr values."""
    obs = pd.DataFrame({name: ["unknown"] * n_cells for name in OBS_STRING_COLUMNS})
    obs["is_primary_data"], obs["observation_joinid"] = True, [str(i) for i in range(n_cells)]
    obs["dataset_id"] = "d"
    categories = {name: ["d" if name == "dataset_id" else "unknown"] for name in OBS_STRING_COLUMNS}
    var = pd.DataFrame({"feature_id": list("abc"), "feature_name": list("abc"), "feature_length": 1})
    with CensusWriter(
        out,
        var=var,
        datasets=[Dataset("d", "d", "d", "d")],
        presence=np.ones((1, 3), bool),
        n_cells=n_cells,
        categories=categories,
        build_tag="small",
    ) as writer:
        writer.append(obs, sp.csr_matrix(np.asarray(values, np.float32)))
        return writer.publish(about={})


def test_obs_is_plain_sorted_and_filtered(planted: Path) -> None:
    with Census.open(planted) as census:
        assert (census.n_cells, census.n_genes, census.tile_cells) == (CELLS, GENES, 2048)
        assert census.schema_version == "2.4.0" and census.uri == str(planted)
        everything = census.obs()
        some = census.obs(["cell_type"], "tissue_general == 'lung' and is_primary_data == True")
        assert list(some.columns) == ["soma_joinid", "cell_type"]
        assert some["soma_joinid"].is_monotonic_increasing
        assert not any(isinstance(t, pd.CategoricalDtype) for t in everything.dtypes)
        assert everything["cell_type"].dtype == object
        want = everything[(everything["tissue_general"] == "lung") & everything["is_primary_data"]]
        np.testing.assert_array_equal(some["soma_joinid"], want["soma_joinid"])
        np.testing.assert_array_equal(some["cell_type"], want["cell_type"])
        assert len(census.obs(["donor_id"], "cell_type == 'no such cell'")) == 0
        var = census.var()
        assert list(var["soma_joinid"]) == list(range(GENES)) and var["feature_id"].dtype == object


def test_ranges_put_together_are_the_whole(planted: Path) -> None:
    with Census.open(planted) as census:
        whole = census.counts(0, CELLS)
        assert whole.dtype == np.int32 and whole.shape == (CELLS, GENES)
        parts = sp.vstack([census.counts(a, min(a + 333, CELLS)) for a in range(0, CELLS, 333)])
        assert (whole != parts).nnz == 0
        empty = np.flatnonzero(census.obs(["raw_sum"])["raw_sum"] == 0)
        assert len(empty) and whole[empty].nnz == 0
        i = int(empty[0])
        assert census.counts(i, i + 1).shape == (1, GENES)
        for start, stop in ((-1, 5), (5, 5), (0, CELLS + 1)):
            with pytest.raises(BadInput, match="cell range"):
                census.counts(start, stop)


def _sum_of_counts(uri: str) -> int:
    with Census.open(uri) as census:
        return int(census.counts(0, census.n_cells).sum())


def test_its_uri_opens_it_in_another_process(planted: Path) -> None:
    with Census.open(planted) as census:
        handle = pickle.loads(pickle.dumps(census.uri))  # noqa: S301
        here = int(census.counts(0, CELLS).sum())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_sum_of_counts, handle).result(timeout=300) == here


@pytest.mark.parametrize(
    ("columns", "condition", "field"),
    [
        (["no_such_column"], None, "obs column"),
        (None, "cell_type = 'B cell'", "value_filter"),
        (None, "cell_type == 3", "value_filter"),
        (None, "no_such_column == 'x'", "value_filter"),
        (None, "cell_type == B", "value_filter"),
        (None, "((", "value_filter"),
    ],
)
def test_a_bad_query_is_one_line_of_bad_input(
    planted: Path, columns: list[str] | None, condition: str | None, field: str
) -> None:
    with Census.open(planted) as census, pytest.raises(BadInput) as refusal:
        census.obs(columns, condition)
    assert refusal.value.field == field and "\n" not in str(refusal.value)


def test_what_is_no_census_is_bad_input(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "a-file").write_text("x")
    soma.Collection.create(str(tmp_path / "collection")).close()
    wrong: list[str | Path] = [
        tmp_path / "missing",
        tmp_path,
        tmp_path / "a-file",
        tmp_path / "collection",
        "gs://bucket/census",
    ]
    for uri in wrong:
        with pytest.raises(BadInput) as refusal:
            Census.open(uri)
        assert refusal.value.exit_code == 2 and "\n" not in str(refusal.value)
        assert "s3://" in str(refusal.value), "the way out is missing"
    with pytest.raises(BadInput, match=r"organism.*homo_sapiens"):
        Census.open(planted, "mus_musculus")
    with Census.open(planted.as_uri()) as census:
        assert census.uri == str(planted)


@pytest.mark.parametrize("value", [-1.0, 0.5, 1e10, float("nan")])
def test_values_that_are_no_counts_are_refused(tmp_path: Path, value: float) -> None:
    uri = write_small(tmp_path / "census", [[1, 0, 2], [0, 0, 0], [3, 0, 0], [0, 4, 0]])
    with Census.open(uri) as census:
        np.testing.assert_array_equal(census.counts(1, 4).toarray(), [[0, 0, 0], [3, 0, 0], [0, 4, 0]])
    # a layer that was normalised after the fact, as some private copies of a Census hold
    x = f"{uri}/census_data/homo_sapiens/ms/RNA/X/raw"
    with soma.SparseNDArray.open(x, "w") as raw:
        raw.write(pa.table({"soma_dim_0": [1], "soma_dim_1": [1], "soma_data": pa.array([value], pa.float32())}))
    record = uri / "census.json"
    record.unlink()
    with Census.open(uri) as census:
        assert census.counts(2, 4).sum() == 7
        with pytest.raises(BadInput) as refusal:
            census.counts(0, 4)
    assert refusal.value.field == "X/raw"


def test_the_same_cells_come_over_s3(planted: Path, s3_service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_service)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "for-the-test-server")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "for-the-test-server")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    client = boto3.client("s3", endpoint_url=s3_service, region_name="us-west-2")
    place = {"LocationConstraint": "us-west-2"}
    for bucket, access in (("cells", "public-read"), ("closed-cells", "private")):
        client.create_bucket(Bucket=bucket, ACL=access, CreateBucketConfiguration=place)
    for path in planted.rglob("*"):
        if path.is_file():
            key = f"a/census/{path.relative_to(planted)}"
            client.put_object(Bucket="cells", Key=key, ACL="public-read", Body=path.read_bytes())
    client.put_object(Bucket="closed-cells", Key="a/census/__group/x", Body=b"")
    uri = "s3://cells/a/census"
    with Census.open(uri) as remote, Census.open(planted) as local:
        assert remote.uri == uri
        assert (remote.counts(0, CELLS) != local.counts(0, CELLS)).nnz == 0
        pd.testing.assert_frame_equal(remote.obs(), local.obs())
        pd.testing.assert_frame_equal(remote.var(), local.var())
        assert (remote.presence()[1] != local.presence()[1]).nnz == 0
    with Census.open(uri, anonymous=True, region="us-west-2") as remote:
        assert remote.n_cells == CELLS and remote.counts(0, 10).shape == (10, GENES)
    with pytest.raises(BadInput, match="census"):
        Census.open("s3://closed-cells/a/census", anonymous=True)
    for wrong in ("s3://cells/elsewhere", "s3://no-such-bucket/census"):
        with pytest.raises(BadInput, match="census"):
            Census.open(wrong)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(BadInput, match="AWS_ENDPOINT_URL"):
        Census.open(uri)


def test_the_public_buckets_are_read_anonymously_from_their_region(monkeypatch: pytest.MonkeyPatch) -> None:
    from scaling_ray.census.source import _s3_config

    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    public = _s3_config("s3://cellxgene-census-public-us-west-2/cell-census/2025-11-08/soma/", None, None)
    assert public == {"vfs.s3.region": "us-west-2", "vfs.s3.no_sign_request": "true"}
    own = _s3_config("s3://my-cells/census", None, None)
    assert own == {"vfs.s3.region": "eu-central-1", "vfs.s3.no_sign_request": "false"}


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    """A script's command in the background inherits SIGINT ignored; to write or read a Census does not change that."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from scaling_ray.census.source import Census\n"
        "from scaling_ray.planted.plant import plant\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "planted = plant(Path(sys.argv[1]), n_cells=2000, n_genes=120)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "with Census.open(planted) as census:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(census.n_cells)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "census")], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "2000\n"), ended.stderr


def test_an_unreachable_or_unknown_release_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked of the network is asked of a closed port of this machine."""
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInput, match="network"):
        Census.open("2025-11-08")


@pytest.mark.network
def test_a_few_cells_of_the_live_census() -> None:
    with Census.open("2025-11-08") as census:
        assert census.census_version == "2025-11-08" and census.n_cells > 150_000_000
        counts = census.counts(0, 64)
        assert counts.shape == (64, census.n_genes) and counts.nnz > 0
        assert census.uri.startswith("s3://")
    with Census.open(census.uri) as again:
        assert (again.counts(0, 64) != counts).nnz == 0
