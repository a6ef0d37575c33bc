"""Files that are whole or absent, on a disk or on S3: atomic writes, places, leases, seals, retries."""

from __future__ import annotations

from pathlib import Path

from scaling_ray.errors import BadInput
from scaling_ray.storage.atomic import (
    PARTIAL_PREFIX,
    create_if_absent,
    file_sha256,
    output_directory,
    partial_directory,
    publish_directory,
    published_file,
    sweep_partial_files,
    write_atomic,
    write_json,
)
from scaling_ray.storage.lease import FollowedLease, Lease, follow_lease
from scaling_ray.storage.local import LocalPlace
from scaling_ray.storage.log import Log
from scaling_ray.storage.place import Claim, Fence, Held, Place, fenced
from scaling_ray.storage.retry import patiently
from scaling_ray.storage.s3 import S3Place
from scaling_ray.storage.s3_client import S3Settings
from scaling_ray.storage.sealed import seal, sealed_json, unseal

__all__ = [
    "PARTIAL_PREFIX",
    "Claim",
    "Fence",
    "FollowedLease",
    "Held",
    "Lease",
    "LocalPlace",
    "Log",
    "Place",
    "S3Place",
    "S3Settings",
    "create_if_absent",
    "fenced",
    "file_sha256",
    "follow_lease",
    "open_place",
    "output_place",
    "output_directory",
    "partial_directory",
    "patiently",
    "publish_directory",
    "published_file",
    "seal",
    "sealed_json",
    "sweep_partial_files",
    "unseal",
    "write_atomic",
    "write_json",
]


def open_place(where: str | Path | Place, field: str = "--out") -> Place:
    """The place of a path or an ``s3://`` URI; BadInput for any other scheme. Nothing is created or asked."""
    if isinstance(where, Place):
        return where
    text = str(where)
    if text.startswith("s3://"):
        return S3Place(text, field)
    if "://" in text:
        raise BadInput("P001", field, text, "is neither a directory nor an s3:// URI; name one of them")
    return LocalPlace(Path(text).absolute(), field)


def output_place(where: str | Path | Place, field: str = "--out") -> Place:
    """The place to write to at a path or ``s3://`` URI; a directory is created. BadInput where it cannot be one."""
    place = open_place(where, field)
    if isinstance(place, LocalPlace):
        output_directory(place.path, field)
    return place
