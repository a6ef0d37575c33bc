"""Saving and resuming by all ranks together: who writes which file, when a checkpoint counts, and who reads what.

All ranks write into one unfinished folder; once each of them has finished, rank 0 publishes it by its marker. Where a
rank dies before that, nobody reads the folder, and resuming starts from the previous checkpoint.
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

    Where the ranks share out the state, each writes its own part and nobody gathers the whole.
    """
    shard = engine.shard()
    if shard is None:
        tensors = state()
        if attempt is not None:
            attempt.save_last(progress, tensors)
        return
    own = attempt.checkpoints.folder(LAST, progress.optimizer_steps) if attempt is not None else None
    folder: Place | None = engine.share(own, {})[0]
    if folder is None:  # a group without files, as benchmarks train
        return
    generator = {generator_name(engine.rank): torch.get_rng_state()}
    write_shard(folder, Shard(shard.layout, shard.tensors | generator))
    written = int(engine.sum_over_ranks(torch.tensor(1)))
    if attempt is not None:
        assert written == engine.ranks
        attempt.publish_last(progress)


def restore(attempt: Attempt | None, engine: Engine) -> tuple[Progress | None, dict[str, Tensor] | Shard]:
    """Progress and state of an earlier attempt, for ``TrainingLoop.load``; (None, {}) where there is none. Every rank.

    Where a checkpoint is shared out exactly as ``engine`` shares out its state, each rank reads its own part; any other
    is assembled by rank 0 and sent to all. Raises BadInput, on every rank, for a checkpoint of another run.
    """
    found: tuple[Progress, Place] | None = None
    refusal: BadInput | None = None
    if attempt is not None:
        try:
            earlier = attempt.find() or attempt.find_trunk()
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
        # rank 0 names the fault if it cannot read the whole either
        return None
