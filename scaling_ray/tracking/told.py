"""One run of a sweep as its files tell of it, read once: result, failure, rows, start and end."""

from __future__ import annotations

from scaling_ray.results.references import UNIT
from scaling_ray.results.sweep_files import SweepFiles, attempts_begun
from scaling_ray.runs import RunSpec
from scaling_ray.tracking import shown
from scaling_ray.tracking.ledger import read_tracked
from scaling_ray.tracking.shown import FAILED, FINISHED, RUNNING


class RunTold:
    """What the files of one run say, read once."""

    def __init__(self, sweep: SweepFiles, run: RunSpec, cells: int) -> None:
        self.run, self.files = run, sweep.run(run.run_id)
        self.result, self.rows = self.files.result(), self.files.rows()
        # The run's own spec has the rate that was chosen for it, and how it is carried out.
        self.spec = self.files.spec() or run
        failure = self.files.failure() if self.result is None else None
        tried_again = failure is not None and attempts_begun(self.files.place) > failure.attempts
        self.failure = None if tried_again else failure
        self.started = self._started()
        self.closed = shown.closed_form_of(sweep, run, cells) if self.result is not None else None

    def _started(self) -> int | None:
        """When it began; what was once told to a server stays, since files of attempts that were cut off go."""
        recorded = read_tracked(self.files.place)
        known = [
            shown.started_ms(self.files, self.rows, self.result),
            recorded.started_ms if recorded is not None and recorded.started_ms else None,
            self.failure.ended_ms if self.failure is not None else None,
        ]
        return min((one for one in known if one is not None), default=None)

    @property
    def lacks_references(self) -> bool:
        """Whether baselines may still come that its gains need."""
        tested = self.result is not None and self.result.test_loss is not None
        return tested and self.closed is None and self.run.train.loss_unit == UNIT

    @property
    def end(self) -> tuple[str, int]:
        """Status and time of the end; of a run that goes on, when it was last heard of."""
        assert self.started is not None
        if self.result is not None:
            return FINISHED, self.result.ended_ms
        status = RUNNING if self.failure is None else FAILED
        return status, shown.ended_ms(self.rows, self.failure, self.started)
