"""Saving and resuming by all ranks together: who writes which file, when a checkpoint counts, and who reads what.

All ranks write into one unfinished directory; once each of them has said so, rank 0 publishes it in one rename. A rank
that dies before that leaves a directory nobody reads, and the checkpoint before it in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.train.checkpoint import Attempt, Found, Progress
from scaling_ray.train.engine import Engine
from scaling_ray.train.sharded import UNREADABLE, Shard, generator_name, read_shard, read_state, write_shard


def save_last(
    attempt: Attempt | None, engine: Engine, progress: Progress, state: Callable[[], dict[str, Tensor]]
) -> None:
    """Publish what resuming needs. Every rank; ``attempt`` is rank 0's, ``state`` gives the whole state on rank 0.

    An engine that shares out its state is not asked for the whole of it: each rank writes its own part.
    """
    shard = engine.shard()
    if shard is None:
        tensors = state()
        if attempt is not None:
            attempt.save_last(progress, tensors)
        return
    building: Path = engine.share(attempt.begin("last") if attempt is not None else None, {})[0]
    own = {generator_name(engine.rank): torch.get_rng_state()}
    write_shard(building, Shard(shard.layout, shard.tensors | own))
    written = int(engine.sum_over_ranks(torch.tensor(1)))
    if attempt is not None:
        assert written == engine.ranks
        attempt.publish(building, "last", progress)


def restore(attempt: Attempt | None, engine: Engine) -> tuple[Progress | None, dict[str, Tensor] | Shard]:
    """Where an earlier attempt stopped, for ``TrainingLoop.load``; (None, {}) where there is nothing. Every rank.

    A checkpoint shared out just as ``engine`` does it is read by each rank on its own; any other is put together by
    rank 0 and sent to all. Raises BadInput, on every rank, for a checkpoint of another spec.
    """
    found: Found | None = None
    refusal: BadInput | None = None
    if attempt is not None:
        try:
            found = attempt.find()
        except BadInput as error:
            refusal = error
    found, refusal = engine.share((found, refusal), {})[0]
    if refusal is not None:
        raise refusal
    if found is None:
        return None, {}
    own = _own_shard(found.directory, engine)
    if int(engine.sum_over_ranks(torch.tensor(int(own is not None)))) == engine.ranks and own is not None:
        return found.progress, own
    tensors = read_state(found.directory) if attempt is not None else {}
    return found.progress, engine.share(None, tensors)[1]


def _own_shard(directory: Path, engine: Engine) -> Shard | None:
    shard = engine.shard()
    try:
        return read_shard(directory, shard.layout) if shard is not None else None
    except UNREADABLE:
        # rank 0 says what is wrong, if it cannot read it either
        return None
