"""What a cloud's metadata service says of a machine's end, asked over real HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from conftest import free_port
from metadata_server import INSTANCE_ACTION, MAINTENANCE, PREEMPTED, REBALANCE, FakeMetadata, metadata_of

from scaling_ray.cli import main
from scaling_ray.errors import BadInput
from scaling_ray.sweep.metadata import Aws, Gcp, MetadataFailure, find_metadata

TIME = "2026-11-28T08:22:00Z"
SECONDS = datetime(2026, 11, 28, 8, 22, tzinfo=UTC).timestamp()


@pytest.fixture
def aws() -> Iterator[FakeMetadata]:
    with metadata_of("aws") as server:
        yield server


@pytest.fixture
def gcp() -> Iterator[FakeMetadata]:
    with metadata_of("gcp") as server:
        yield server


def test_aws_is_silent_until_it_takes_the_instance(aws: FakeMetadata) -> None:
    metadata = Aws(aws.url)
    assert metadata.notice() is None
    aws.items[INSTANCE_ACTION] = json.dumps({"action": "terminate", "time": TIME})
    notice = metadata.notice()
    assert notice is not None and notice.deadline_seconds == SECONDS and "terminate" in notice.what
    assert metadata.notice() == notice and len(aws.tokens) == 1, "a token serves until it expires"


def test_another_time_is_another_notice(aws: FakeMetadata) -> None:
    aws.items[INSTANCE_ACTION] = json.dumps({"action": "stop", "time": TIME})
    first = Aws(aws.url).notice()
    aws.items[INSTANCE_ACTION] = json.dumps({"action": "stop", "time": TIME.replace("08:22", "09:22")})
    second = Aws(aws.url).notice()
    assert first is not None and second is not None and first.key != second.key


def test_hibernation_begins_at_once(aws: FakeMetadata) -> None:
    aws.items[INSTANCE_ACTION] = json.dumps({"action": "hibernate"})
    metadata, before = Aws(aws.url), time.time()
    notice = metadata.notice()
    again = metadata.notice()
    assert notice is not None and notice.deadline_seconds is not None and again is not None
    assert before <= notice.deadline_seconds <= time.time() and again.key == notice.key


def test_an_expired_token_is_renewed(aws: FakeMetadata) -> None:
    metadata = Aws(aws.url)
    assert metadata.notice() is None
    aws.tokens.clear()
    aws.items[INSTANCE_ACTION] = json.dumps({"action": "terminate", "time": TIME})
    assert metadata.notice() is not None


def test_a_rebalance_recommendation_is_a_notice_where_asked_for(aws: FakeMetadata) -> None:
    aws.items[REBALANCE] = json.dumps({"noticeTime": TIME})
    assert Aws(aws.url).notice() is None
    notice = Aws(aws.url, rebalance=True).notice()
    assert notice is not None and notice.deadline_seconds is None and TIME in notice.what
    aws.items[INSTANCE_ACTION] = json.dumps({"action": "terminate", "time": TIME})
    later = Aws(aws.url, rebalance=True).notice()
    assert later is not None and later.deadline_seconds == SECONDS, "an interruption goes before a recommendation"


@pytest.mark.parametrize(("item", "seconds"), [(PREEMPTED, 30), (MAINTENANCE, 60)])
def test_gcp_gives_seconds_that_count_from_the_last_answer_without_a_notice(
    gcp: FakeMetadata, item: str, seconds: float
) -> None:
    metadata, before = Gcp(gcp.url), time.time()
    assert metadata.notice() is None
    clear = time.time()
    gcp.items[item] = "TRUE" if item == PREEMPTED else "TERMINATE_ON_HOST_MAINTENANCE"
    time.sleep(0.2)
    notice = metadata.notice()
    assert notice is not None and notice.deadline_seconds is not None
    assert before + seconds <= notice.deadline_seconds <= clear + seconds
    assert metadata.notice() == notice


def test_gcp_moves_a_machine_without_harm(gcp: FakeMetadata) -> None:
    gcp.items[MAINTENANCE] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert Gcp(gcp.url).notice() is None


@pytest.mark.parametrize(
    "text", ["", "<html>", "[]", '{"action": 3}', '{"time": "x"}', '{"action": "terminate", "time": "soon"}']
)
def test_an_answer_that_is_no_notice_drains_nothing(aws: FakeMetadata, text: str) -> None:
    aws.items[INSTANCE_ACTION] = text
    with pytest.raises(MetadataFailure, match="spot/instance-action"):
        Aws(aws.url).notice()


def test_a_failing_service_is_a_failure_and_not_silence(aws: FakeMetadata, gcp: FakeMetadata) -> None:
    metadata = (Aws(aws.url), Gcp(gcp.url))
    assert [one.notice() for one in metadata] == [None, None]
    aws.broken = gcp.broken = True
    for one in metadata:
        with pytest.raises(MetadataFailure, match="answers 503"):
            one.notice()
    gcp.broken, gcp.items[PREEMPTED] = False, "MAYBE"
    with pytest.raises(MetadataFailure, match="MAYBE"):
        metadata[1].notice()
    with pytest.raises(MetadataFailure, match="does not answer"):
        Aws(f"http://127.0.0.1:{free_port()}").notice()


def test_the_cloud_is_found_by_its_own_protocol(aws: FakeMetadata, gcp: FakeMetadata) -> None:
    for server in (aws, gcp):
        found = find_metadata("auto", server.url)
        assert found is not None and found.provider == server.provider
    assert not Gcp(aws.url).is_there() and not Aws(gcp.url).is_there()


def test_a_proxy_of_the_environment_is_not_asked(aws: FakeMetadata, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    assert Aws(aws.url).notice() is None


def test_a_machine_of_no_cloud_has_nothing_to_watch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node-watch", "--metadata-url", f"http://127.0.0.1:{free_port()}"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "no metadata service of AWS or GCP answers here" in line


def test_a_named_cloud_that_does_not_answer_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["node-watch", "--provider", "gcp", "--metadata-url", url, "--once"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"scaling-ray: {url}/computeMetadata/v1/instance/preempted does not answer")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--every", "0"], "--every"),
        (["--metadata-url", "file:///etc"], "--metadata-url"),
        (["--metadata-url", "http://host/path"], "--metadata-url"),
        (["--drain-now", "--deadline", "-1"], "--deadline"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], field: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node-watch", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scaling-ray: ") and f" {field}: " in line


def test_an_address_with_a_query_is_bad_input() -> None:
    with pytest.raises(BadInput, match="--metadata-url"):
        find_metadata("auto", "http://host?x=1")
