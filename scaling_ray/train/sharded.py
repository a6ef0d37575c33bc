"""A training state in pieces: what each rank of ZeRO holds of it, as files, and the whole put together from them.

Of every parameter, flattened, a rank holds the elements start..start + n, or none. It writes them, with the same
elements of both moments, as ``state-rank0of2.safetensors`` and says in ``state-rank0of2.json`` which they are. A state
that is not shared out is one ``state.safetensors``.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WHOLE = "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
PREFIXES = ("model.", *(f"optimizer.{key}." for key in MOMENTS))
STEP = "optimizer.step"

UNREADABLE = (OSError, ValueError, TypeError, KeyError, SafetensorError)
"""What reading a checkpoint raises where its files are absent, cut short or not what they should be."""


@dataclass(frozen=True)
class Layout:
    """What one rank holds: full shapes of all parameters, and of its fragments (start, elements), by parameter."""

    stage: int
    rank: int
    ranks: int
    shapes: dict[str, list[int]]
    fragments: dict[str, tuple[int, int]]

    @staticmethod
    def from_json(text: str) -> Layout:
        """The inverse of ``to_json``; ValueError, TypeError or KeyError where it is none."""
        fields = json.loads(text)
        fields["fragments"] = {name: (start, elements) for name, (start, elements) in fields["fragments"].items()}
        return Layout(**fields)

    def to_json(self) -> str:
        """As JSON, with the fragments' starts and lengths."""
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Shard:
    """One rank's pieces on the CPU: ``model.<name>`` and ``optimizer.<moment>.<name>``, each (elements,) in fp32.

    ``optimizer.step`` is there once for all, absent before the first update; tensors of other names belong to the rank
    as they are, like the state of its random generator.
    """

    layout: Layout
    tensors: dict[str, Tensor]


def generator_name(rank: int) -> str:
    """The name of a rank's generator state among the tensors of a checkpoint."""
    return f"generator.{rank}" if rank else "generator"


def _shard_name(rank: int, ranks: int) -> str:
    return f"state-rank{rank}of{ranks}"


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to a safetensors file and flush it to its disk."""
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def write_shard(directory: Path, shard: Shard) -> None:
    """Write this rank's files into an unfinished checkpoint."""
    name = _shard_name(shard.layout.rank, shard.layout.ranks)
    (directory / f"{name}.json").write_text(shard.layout.to_json(), encoding="utf-8")
    write_tensors(directory / f"{name}.safetensors", shard.tensors)


def read_shard(directory: Path, layout: Layout) -> Shard | None:
    """This rank's own pieces; None where the checkpoint is not shared out in exactly this way."""
    name = _shard_name(layout.rank, layout.ranks)
    path = directory / f"{name}.json"
    if not path.is_file() or Layout.from_json(path.read_text(encoding="utf-8")) != layout:
        return None
    return Shard(layout, load_file(directory / f"{name}.safetensors"))


def read_state(directory: Path) -> dict[str, Tensor]:
    """The whole state of a checkpoint, shared out or not, under the names that every engine takes.

    Raises one of UNREADABLE where files are absent or damaged, or leave a gap.
    """
    if (directory / WHOLE).is_file():
        return load_file(directory / WHOLE)
    layouts = _layouts(directory)
    shapes = layouts[0].shapes
    tensors: dict[str, Tensor] = {}
    for layout in layouts:
        pieces = load_file(directory / f"{_shard_name(layout.rank, layout.ranks)}.safetensors")
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


def check_state(directory: Path) -> None:
    """Raise one of UNREADABLE unless every file of a checkpoint's state is there and as long as it says it is."""
    if (directory / WHOLE).is_file():
        _check_length(directory / WHOLE)
        return
    for layout in _layouts(directory):
        _check_length(directory / f"{_shard_name(layout.rank, layout.ranks)}.safetensors")


def _check_length(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except UNREADABLE as error:
        raise ValueError(f"{path.name}: {error}") from error


def _layouts(directory: Path) -> list[Layout]:
    """The layouts of all ranks in order; their fragments cover every parameter once."""
    found = sorted(directory.glob("state-rank0of*.json"))
    if len(found) != 1:
        raise ValueError(f"{WHOLE} is absent, and so are shards of one number of ranks")
    ranks = Layout.from_json(found[0].read_text(encoding="utf-8")).ranks
    paths = [directory / f"{_shard_name(rank, ranks)}.json" for rank in range(ranks)]
    layouts = [Layout.from_json(path.read_text(encoding="utf-8")) for path in paths]
    for name, shape in layouts[0].shapes.items():
        held = sorted(layout.fragments[name] for layout in layouts if name in layout.fragments)
        edges = [(0, 0), *held, (torch.Size(shape).numel(), 0)]
        if any(start + elements != following for (start, elements), (following, _) in pairwise(edges)):
            raise ValueError(f"the shards of {name} leave a gap or overlap")
    return layouts
