"""Saving and resuming by all ranks together: who writes which file, when a checkpoint counts, and who reads what.

All ranks write into one unfinished folder; once each of them has said so, rank 0 publishes it by its marker. A rank
that dies before that leaves a folder nobody reads, and the checkpoint before it in its place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scaling_ray.errors import BadInput
from scaling_ray.storage import Place
from scaling_ray.train.attempt import LAST, Attempt
from scaling_ray.train.checkpoint import Progress
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
    own = attempt.checkpoints.folder(LAST, progress.optimizer_steps) if attempt is not None else None
    folder: Place = engine.share(own, {})[0]
    generator = {generator_name(engine.rank): torch.get_rng_state()}
    write_shard(folder, Shard(shard.layout, shard.tensors | generator))
    written = int(engine.sum_over_ranks(torch.tensor(1)))
    if attempt is not None:
        assert written == engine.ranks
        attempt.publish_last(progress)


def restore(attempt: Attempt | None, engine: Engine) -> tuple[Progress | None, dict[str, Tensor] | Shard]:
    """Where an earlier attempt stopped, for ``TrainingLoop.load``; (None, {}) where there is nothing. Every rank.

    A checkpoint shared out just as ``engine`` does it is read by each rank on its own; any other is put together by
    rank 0 and sent to all. Raises BadInput, on every rank, for a checkpoint of another run.
    """
    found: tuple[Progress, Place] | None = None
    refusal: BadInput | None = None
    if attempt is not None:
        try:
            earlier = attempt.find()
            found = (earlier[0], earlier[1].folder) if earlier is not None else None
        except BadInput as error:
            refusal = error
    found, refusal = engine.share((found, refusal), {})[0]
    if refusal is not None:
        raise refusal
    if found is None:
        return None, {}
    progress, folder = found
    own = _own_shard(folder, engine)
    if int(engine.sum_over_ranks(torch.tensor(int(own is not None)))) == engine.ranks and own is not None:
        return progress, own
    tensors = read_state(folder) if attempt is not None else {}
    return progress, engine.share(None, tensors)[1]


def _own_shard(folder: Place, engine: Engine) -> Shard | None:
    shard = engine.shard()
    try:
        return read_shard(folder, shard.layout) if shard is not None else None
    except UNREADABLE:
        # rank 0 says what is wrong, if it cannot read it either
        return None
