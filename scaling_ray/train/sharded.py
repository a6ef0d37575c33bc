"""A training state in pieces: the files that each rank of ZeRO writes, and the whole state assembled from them.

A rank holds the elements start..start + n of each flattened parameter, or none. It writes them, with the same elements
of both moments, as ``state-rank0of2.safetensors``; ``state-rank0of2.json`` says which elements they are. A state that
is not shared out is one ``state.safetensors``. Beside a rank's file of tensors lies ``<file>.sha256.json`` with the
length and hash that its writer found; ``progress.json`` of the checkpoint gathers and seals them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from scaling_ray.storage import Place, file_sha256

WHOLE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIXES = ("model.", *(f"optimizer.{key}." for key in MOMENTS))
STEP = "optimizer.step"
HASH = ".sha256.json"

UNREADABLE = (OSError, ValueError, TypeError, KeyError, SafetensorError)
"""Errors that reading a checkpoint raises where its files are absent, cut short or otherwise damaged."""


@dataclass(frozen=True)
class Layout:
    """Which elements one rank holds: full shapes of all parameters, and (start, elements) of its own fragments."""

    stage: int
    rank: int
    ranks: int
    shapes: dict[str, list[int]]
    fragments: dict[str, tuple[int, int]]

    @staticmethod
    def from_json(text: str | bytes) -> Layout:
        """The inverse of ``to_json``; raises ValueError, TypeError or KeyError for any other text."""
        fields = json.loads(text)
        fields["fragments"] = {name: (start, elements) for name, (start, elements) in fields["fragments"].items()}
        return Layout(**fields)

    def to_json(self) -> str:
        """As JSON, with the fragments' starts and lengths."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Shard:
    """One rank's pieces on the CPU: ``model.<name>`` and ``optimizer.<moment>.<name>``, each (elements,) in fp32.

    ``optimizer.step`` is one tensor for all parameters, absent before the first update. Tensors of other names belong
    to the rank alone, such as the state of its random generator.
    """

    layout: Layout
    tensors: dict[str, Tensor]


def generator_name(rank: int) -> str:
    """The name of a rank's generator state among the tensors of a checkpoint."""
    return f"generator.{rank}" if rank else "generator"


def _shard_name(rank: int, ranks: int) -> str:
    return f"state-rank{rank}of{ranks}"


def write_tensors(place: Place, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write tensors as a safetensors file; returns its length and hash."""
    with place.scratch(name) as folder:
        path = folder / "tensors"
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
        told = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        place.put_file(name, path)
    return told


def write_shard(place: Place, shard: Shard) -> None:
    """Write this rank's files into an unfinished checkpoint."""
    name = _shard_name(shard.layout.rank, shard.layout.ranks)
    place.write(f"{name}.json", shard.layout.to_json().encode())
    told = write_tensors(place, f"{name}.safetensors", shard.tensors)
    place.write(f"{name}.safetensors{HASH}", json.dumps(told).encode())


def listed_files(place: Place) -> dict[str, dict[str, Any]]:
    """Length and hash of each file of an unfinished checkpoint: as the writer of tensors noted, else as read here."""
    found = {}
    names = place.names()
    for name in names:
        if name.endswith(HASH):
            continue
        if name + HASH in names:
            found[name] = json.loads(place.read(name + HASH))
        else:
            data = place.read(name)
            found[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return found


def check_files(place: Place, files: dict[str, dict[str, Any]]) -> None:
    """Raise one of UNREADABLE unless every file is there and is what its entry says."""
    if not files:
        raise ValueError("names no files")
    for name, told in files.items():
        with place.local_copy(name) as path:
            if path.stat().st_size != told["bytes"]:
                raise ValueError(f"{name}: has {path.stat().st_size} bytes, {told['bytes']} were written")
            if file_sha256(path) != told["sha256"]:
                raise ValueError(f"{name}: its contents changed since it was written (sha256 differs)")


def _load(place: Place, name: str) -> dict[str, Tensor]:
    with place.local_copy(name) as path:
        return load_file(path)


def read_shard(place: Place, layout: Layout) -> Shard | None:
    """This rank's own pieces; None where the checkpoint is not shared out in exactly this way."""
    name = _shard_name(layout.rank, layout.ranks)
    text = place.read_if_there(f"{name}.json")
    if text is None or Layout.from_json(text) != layout:
        return None
    return Shard(layout, _load(place, f"{name}.safetensors"))


def read_state(place: Place) -> dict[str, Tensor]:
    """The whole state of a checkpoint, shared out or not, under the names that every engine takes.

    Raises one of UNREADABLE where files are absent or damaged, or leave a gap.
    """
    if place.exists(WHOLE):
        return _load(place, WHOLE)
    layouts = _layouts(place)
    shapes = layouts[0].shapes
    tensors: dict[str, Tensor] = {}
    for layout in layouts:
        pieces = _load(place, f"{_shard_name(layout.rank, layout.ranks)}.safetensors")
        step = pieces.pop(STEP, None)
        prefixes = PREFIXES if step is not None else PREFIXES[:1]
        if layout.rank == 0:
            tensors |= {prefix + name: torch.empty(shape) for prefix in prefixes for name, shape in shapes.items()}
            if step is not None:
                tensors |= {f"{STEP}.{name}": step.clone() for name in shapes}
        for name, (start, elements) in layout.fragments.items():
            for prefix in prefixes:
                tensors[prefix + name].view(-1)[start : start + elements] = pieces.pop(prefix + name)
        tensors |= pieces
    return tensors


def _layouts(place: Place) -> list[Layout]:
    """The layouts of all ranks in order; ValueError unless their fragments cover every parameter exactly once."""
    found = [name for name in place.names("state-rank0of") if name.endswith(".json") and not name.endswith(HASH)]
    if len(found) != 1:
        raise ValueError(f"{WHOLE} is absent, and so are shards of one number of ranks")
    ranks = Layout.from_json(place.read(found[0])).ranks
    layouts = [Layout.from_json(place.read(f"{_shard_name(rank, ranks)}.json")) for rank in range(ranks)]
    for name, shape in layouts[0].shapes.items():
        held = sorted(layout.fragments[name] for layout in layouts if name in layout.fragments)
        edges = [(0, 0), *held, (torch.Size(shape).numel(), 0)]
        if any(start + elements != following for (start, elements), (following, _) in pairwise(edges)):
            raise ValueError(f"the shards of {name} leave a gap or overlap")
    return layouts
