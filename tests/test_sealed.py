"""What is read back is checked against a hash that is itself covered: records of every kind, and other documents."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from scaling_ray.errors import BadInput
from scaling_ray.records import Record, RunFailure, ShardManifest
from scaling_ray.storage import seal, sealed_json, unseal

FIELDS: dict[str, Any] = {
    "version": 3,
    "name": 'λ "quoted" \\ and\nmore',
    "loss": 0.1 + 0.2,
    "tiny": 5e-324,
    "whole": 2.0,
    "flops": 1.5e18,
    "none": None,
    "yes": True,
    "deep": {"b": [1, -2, 3.5], "a": {"x": []}},
}


def test_what_was_sealed_is_read_back_as_it_was() -> None:
    assert unseal(sealed_json(FIELDS), "file") == FIELDS
    assert unseal(sealed_json(FIELDS).encode(), "file") == FIELDS
    assert list(seal(FIELDS)) == [*FIELDS, "sha256"]
    assert seal(FIELDS) == seal(dict(reversed(FIELDS.items())))
    assert sealed_json(FIELDS).endswith("}\n")


def test_the_seal_is_of_the_contents_and_not_of_the_layout() -> None:
    fields = json.loads(sealed_json(FIELDS))
    assert unseal(json.dumps(fields), "file") == unseal(json.dumps(fields, indent=4, sort_keys=True), "file") == FIELDS


def test_every_flipped_bit_and_every_cut_is_refused() -> None:
    whole = sealed_json(FIELDS).encode()
    for at in range(len(whole)):
        for bit in range(8):
            with pytest.raises(BadInput, match="file: .*; make it anew") as refusal:
                unseal(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :], "file")
            assert "\n" not in str(refusal.value)
    for length in range(len(whole) - 1):
        with pytest.raises(BadInput):
            unseal(whole[:length], "file")


def test_digits_that_round_to_the_same_float_are_refused_too() -> None:
    text = sealed_json({"loss": 0.1})
    other = text.replace("0.1", "0.10000000000000001")
    assert json.loads(other) == json.loads(text) and other != text
    with pytest.raises(BadInput, match="was changed since it was written"):
        unseal(other, "file")
    with pytest.raises(BadInput, match="was changed"):
        unseal(sealed_json({"cells": 2}).replace("2,", "2.0,"), "file")


def test_a_field_more_or_less_or_moved_is_refused() -> None:
    fields = json.loads(sealed_json(FIELDS))
    changed: list[dict[str, Any]] = [fields | {"more": 1}, {key: fields[key] for key in fields if key != "none"}]
    changed.append(fields | {"deep": {"b": [1, -2], "a": {"x": [3.5]}}})
    changed.append(fields | {"sha256": fields["sha256"].upper()})
    for each in changed:
        with pytest.raises(
            BadInput, match="file: .*, not .*: was changed since it was written; remove it and call again"
        ):
            unseal(json.dumps(each), "file", "remove it and call again")
    others: list[Any] = [FIELDS, {"sha256": 7}, [], None, "text"]
    for unsealed in others:
        with pytest.raises(BadInput, match="was written by another version, or is damaged"):
            unseal(json.dumps(unsealed), "file")


def test_what_json_cannot_say_or_is_named_like_the_seal_is_not_sealed() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            sealed_json({"loss": value})
    with pytest.raises(ValueError, match="sha256"):
        seal({"sha256": "mine"})


# records


def manifest() -> ShardManifest:
    return ShardManifest(
        name="test",
        data_hash="0" * 64,
        genes=1,
        block_genes=256,
        row_group_cells=16_384,
        split_by="donor_id",
        data={"filter": "tissue == 'lung'", "umi": 0.1},
        census={},
        planted=False,
        dropped={},
        splits={},
        tables=[],
        codes={"donor_id": ["é"]},
        made_with={},
    )


RECORDS: list[Record] = [
    manifest(),
    RunFailure(run_id="a", failure="bug", message="line 1\nline 2", attempts=3),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_is_read_as_it_was_written_and_refused_with_any_byte_changed(record: Record, tmp_path: Path) -> None:
    kind, path = type(record), tmp_path / "record.json"
    path.write_text(record.to_json(), encoding="utf-8")
    assert kind.read(path) == kind.parse(record.to_json(), "text") == record
    assert kind.parse(record.to_json(), "text").to_json() == record.to_json()
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(BadInput, match="record.json: ") as refusal:
            kind.read(path)
        assert "\n" not in str(refusal.value)


def test_a_sealed_record_of_another_version_or_kind_is_refused() -> None:
    fields = unseal(RECORDS[1].to_json(), "text")
    for odd in (fields | {"version": 1}, fields | {"more": 1}, {"version": fields["version"]}):
        with pytest.raises(BadInput, match="failure.json: .*: is not a RunFailure of this version; make it anew"):
            RunFailure.parse(sealed_json(odd), "failure.json")
    with pytest.raises(BadInput, match="written by another version"):
        RunFailure.parse(json.dumps(fields), "failure.json")
