"""Shared fixtures: small synthetic cells and specs, one torch thread."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from scaling_ray.records import ShardManifest, SplitEntry
from scaling_ray.results.sweep_files import RunFiles, read_rows
from scaling_ray.runs import RunSpec, runs_of
from scaling_ray.shards.format import block_name, block_widths, encode_block, split_content, write_file, write_table
from scaling_ray.shards.read import Cells
from scaling_ray.spec import parse_spec
from scaling_ray.storage import Place, S3Place, open_place

# Ray starts its workers at niceness 15, which on a busy machine is next to nothing; tests wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads; tests that need torch get one."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    yield


def synthetic_cells(cells: int, genes: int = 64, seed: int = 0, first_id: int = 0, unmeasured: int = 0) -> Cells:
    """Overdispersed counts of two datasets; the second one did not measure the last ``unmeasured`` genes."""
    rng = np.random.default_rng([seed, first_id])
    gene_rate = np.random.default_rng(seed).gamma(0.5, 3.0, size=(1, genes))
    program = np.random.default_rng(seed + 1).lognormal(0.0, 0.7, size=(4, genes))
    state = rng.integers(0, 4, cells)
    depth = rng.gamma(4.0, 0.5, size=(cells, 1))
    counts = rng.poisson(gene_rate * program[state] * depth).astype(np.uint16)
    dataset = (np.arange(cells) % 2).astype(np.int32)
    measured = np.ones((2, genes), dtype=bool)
    if unmeasured:
        measured[1, -unmeasured:] = False
    counts[~measured[dataset]] = 0
    raw_sum = counts.sum(1).astype(np.int64) * 3 + 1
    ids = first_id + 7 * np.arange(cells, dtype=np.int64)
    return Cells(counts, raw_sum, ids, dataset, (np.arange(cells) % 5).astype(np.int32), measured)


@pytest.fixture
def make_cells() -> Callable[..., Cells]:
    """``synthetic_cells`` as a fixture."""
    return synthetic_cells


def write_cells_as_shards(
    directory: Path, splits: dict[str, Cells], file_cells: int = 131_072, row_group_cells: int = 16_384
) -> ShardManifest:
    """Shards of some cells by the project's own writers; small files and row groups make a few cells act like many."""
    entries = {}
    target = open_place(directory)
    for split, cells in splits.items():
        genes = cells.counts.shape[1]
        columns = {"cell": cells.cell, "raw_sum": cells.raw_sum, "cell_type": cells.dataset, "disease": cells.dataset}
        columns |= {"tissue": cells.dataset, "assay": cells.dataset}
        columns |= {"dataset_id": cells.dataset, "donor_id": cells.donor}
        columns |= {
            block_name(i): encode_block(cells.counts[:, 256 * i : 256 * (i + 1)])
            for i in range(len(block_widths(genes)))
        }
        table = pa.table(columns)
        written = [
            write_file(target, f"{split}-{n:05d}.parquet", [table.slice(start, file_cells)], genes, row_group_cells)
            for n, start in enumerate(range(0, len(cells), file_cells))
        ]
        files = [file for file in written if file is not None]
        assert len(files) == len(written)
        entries[split] = SplitEntry(
            cells=len(cells),
            fraction=1 / 3,
            groups=[split],
            donor_cells=np.bincount(cells.donor).tolist(),
            content_sha256=split_content(files),
            files=files,
        )
    presence = pa.table({"measured": encode_block(next(iter(splits.values())).measured.astype(np.uint16))})
    manifest = ShardManifest(
        name="test",
        data_hash="synthetic",
        genes=genes,
        block_genes=256,
        row_group_cells=row_group_cells,
        split_by="donor_id",
        data={},
        census={},
        planted=False,
        dropped={},
        splits=entries,
        tables=[write_table(target, "presence.parquet", presence)],
        codes={},
        made_with={},
    )
    (directory / "manifest.json").write_text(manifest.to_json())
    return manifest


def small_run(
    extra_train: str = "", size: str = "TINY", genes: int = 64, cells: str = '"all"', lr: float = 1e-2
) -> RunSpec:
    """One run from a spec of one grid cell, so that tests take their specs through the parser."""
    return runs_of(
        parse_spec(
            f"""
        name = "test"
        sizes.WIDE = {{ width = 8, layers = 2, heads = 2, feedforward = 2 }}
        [grid]
        sizes = ["{size}"]
        genes = [{genes}]
        cells = [{cells}]
        seeds = [1]
        [lr]
        rates = [{lr}]
        [train]
        {extra_train}
        """
        )
    )[0]


def files_at(directory: Path) -> RunFiles:
    """A run's files in a directory."""
    return RunFiles(open_place(directory))


def rows_at(directory: Path) -> list[dict[str, Any]]:
    """The whole rows of the metrics.jsonl in a directory; none where there is no such file."""
    return read_rows(open_place(directory))


@pytest.fixture
def make_run() -> Callable[..., RunSpec]:
    """``small_run`` as a fixture."""
    return small_run


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One private Ray of two CPUs for every test that asks for it; the package's own sessions join it."""
    from scaling_ray.cluster import ray_session

    with ray_session(2):
        yield


@pytest.fixture(scope="session")
def planted_census(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A planted Census of 900 cells and 200 genes."""
    from scaling_ray.planted.plant import plant

    return plant(tmp_path_factory.mktemp("planted") / "census", n_cells=900, n_genes=200, seed=1)


TINY_SWEEP = """
name = "tiny"
[data]
genes = 64
[grid]
sizes = ["XXS", "W4"]
genes = [64]
cells = [100, "all"]
seeds = [1]
[sizes.W4]
width = 4
layers = 1
heads = 1
feedforward = 1
[train]
max_cells_seen = 640
evaluations = 4
[lr]
rule = "choose"
rates = [3e-3, 1e-2]
"""


@pytest.fixture(scope="session")
def tiny_shards(planted_census: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """Shards of the planted Census by TINY_SWEEP's rules."""
    from scaling_ray.shards.convert import build_shards

    out = tmp_path_factory.mktemp("shards") / "shards"
    build_shards(parse_spec(TINY_SWEEP), str(planted_census), out)
    return out


S3_SERVER = r'''
import os, random, re, sys, threading, time
port, log, share = int(sys.argv[1]), open(sys.argv[2], "a", buffering=1), float(sys.argv[3])
os.environ["MOTO_PORT"] = str(port)
os.environ["MOTO_S3_DEFAULT_MAX_KEYS"] = "100"  # a server may list fewer names in an answer than the most, 1,000
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

moto = DomainDispatcherApplication(create_backend_app)
one_at_a_time, being_put, already = threading.Lock(), set(), {}
chance = {method: random.Random(f"33 {method}") for method in ("GET", "HEAD", "PUT", "POST", "DELETE")}


def fault_of(method, path, query):
    """What goes wrong with a request: by chance, or as often as its name asks for."""
    with one_at_a_time:
        if chance[method].random() < share:  # the n-th of its kind, whatever comes between
            return chance[method].choice(("refused", "cut" if method == "GET" else "lost"))
        asked = re.search("(refused|lost|cut|unended)-([0-9]+)-times(?:-after-([0-9]+))?", path)
        if not asked or method != {"cut": "GET", "unended": "POST"}.get(asked[1], "PUT"):
            return ""
        if asked[1] == "unended" and "uploadId" not in query:  # the answer to the end of an upload in parts gets lost
            return ""
        already[path] = already.get(path, 0) + 1
        fault = "lost" if asked[1] == "unended" else asked[1]
        first = int(asked[3] or 0)
        return fault if first < already[path] <= first + int(asked[2]) else ""


def claim(path):
    with one_at_a_time:
        free = path not in being_put
        being_put.add(path)
        return free


def error(status, code):
    text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
    return status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))], text


def ask_moto(environ):
    said = []
    parts = moto(environ, lambda status, headers, _=None: said.append((status, headers)))
    try:
        return *said[0], b"".join(parts)
    finally:
        parts.close()


def answer_to(environ, path, fault):
    conditional = environ["REQUEST_METHOD"] == "PUT" and {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & set(environ)
    refusal = None
    if fault == "refused":
        refusal = error("500 Internal Server Error", "InternalError")
    elif conditional and not claim(path):
        refusal = error("409 Conflict", "ConditionalRequestConflict")
    if refusal:
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        return refusal
    try:
        if conditional:  # moto looks first and puts after; S3 does both at once, and says so to who comes meanwhile
            time.sleep(0.02)
        return ask_moto(environ)
    finally:
        if conditional:
            being_put.discard(path)


def broken(body):
    yield body[: len(body) // 2]
    raise ConnectionResetError


def application(environ, start_response):
    method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
    query, by = environ["QUERY_STRING"], environ.get("HTTP_AUTHORIZATION", "")
    fault = "" if "the-test-itself" in by else fault_of(method, path, query)
    status, headers, body = answer_to(environ, path, fault)
    if fault == "cut" and not (method == "GET" and len(body) > 1):
        fault = "lost"
    if fault == "lost":
        status, headers, body = error("500 Internal Server Error", "InternalError")
    with one_at_a_time:
        log.write(f"{method} {path} {status[:3]} {len(body)} {fault or '-'}\n")
    start_response(status, headers)
    return broken(body) if fault == "cut" else [body]


make_server("127.0.0.1", port, application, threaded=True, request_handler=MotoRequestHandler).serve_forever()
'''


PROXY = """
import asyncio, sys

async def pump(reader, writer):
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()

async def connect(reader, writer):
    there = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

async def serve():
    server = await asyncio.start_server(connect, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(serve())
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(port: int, program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that listens on ``port`` of this machine, until the block ends."""
    command = [sys.executable, "-c", program, *arguments]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield server
    finally:
        server.kill()
        server.wait(timeout=20)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server of this machine and the log of what it was asked."""

    port: int
    log: Path
    client: Any
    """A boto3 client of the test itself, for which nothing goes wrong on purpose."""

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """The variables by which AWS tools find it, and nothing else of this machine's settings."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": "for-the-test-server",
            "AWS_SECRET_ACCESS_KEY": "for-the-test-server",
            "AWS_SHARED_CREDENTIALS_FILE": "/no/such/file",
            "AWS_CONFIG_FILE": "/no/such/file",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def requests(self) -> list[list[str]]:
        """What it was asked so far: method, path, status, bytes of the answer, what went wrong on purpose or "-"."""
        return [line.split() for line in self.log.read_text().splitlines()]

    def objects(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """Every object below a prefix, by its name there, asked past the package."""
        found = {}
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for entry in page.get("Contents", []):
                body = self.client.get_object(Bucket=bucket, Key=entry["Key"])["Body"]
                found[entry["Key"].removeprefix(prefix)] = body.read()
        return found


@contextmanager
def running_s3(folder: Path, failing: float = 0.0) -> Iterator[S3Server]:
    """moto's S3 with a bucket named "shards"; of every ``failing`` share of requests the answer is an error or cut."""
    import boto3

    port, log = free_port(), folder / "requests.log"
    with serving(port, S3_SERVER, str(port), str(log), str(failing)):
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            region_name="us-west-2",
            aws_access_key_id="the-test-itself",
            aws_secret_access_key="for-the-test-server",
        )
        try:
            client.create_bucket(Bucket="shards", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
            yield S3Server(port, log, client)
        finally:
            client.close()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One S3 server for every test that asks for it; a process of its own, as a client may hold the interpreter."""
    with running_s3(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The same, and this process's environment leads to it."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    yield s3_server


@pytest.fixture
def on_s3(s3: S3Server) -> S3Place:
    """A folder of the bucket that nothing is in."""
    return S3Place(f"s3://shards/{uuid.uuid4().hex}/shards")


@pytest.fixture(params=["local", "s3"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """A place that holds nothing yet, of each kind."""
    if request.param == "s3":
        return request.getfixturevalue("on_s3")
    return open_place(tmp_path / "shards")
