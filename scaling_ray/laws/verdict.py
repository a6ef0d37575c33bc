"""The rule: what a table of runs supports, what it allows within a stated misfit, and what it leaves open.

Verdicts. *supported*: a power law describes the runs within their noise. *approximate*: it describes them within a
misfit that is stated, and every interval is widened by it; good for planning, no constant of nature. *refused*: the
runs leave the exponent open. Size, data and both together get one each, and so do predictions.

Noise. Replicates say how far runs of one setting spread, and whether small sizes spread further (:mod:`noise`). A
setting weighs by the variance of its mean: that of its runs, and a declared least misfit with a standard deviation of
1% of the loss drop, since no sweep is known to follow a power law more closely (along one axis neighbours share their
misfit: beyond six values it counts as that of six). Fit, intervals, tests and contrasts use
the same variance. Where settings have no replicates, residuals stand in from 4 degrees of freedom on.

Intervals. The variance behind every shown interval is the larger of that noise and of the misfit of setting means, each
with the degrees of freedom that it is known by (of both together where neither is beyond the other at p = 0.01). The
shown interval is the union of the profile at that variance with the profiles at the same variance that leave out each
size, or each number of cells. Of such a refit counts the part of the left out size's variance that is misfit: how far
noise can move it, the interval of all runs holds already. Beside it stands the statistical interval, from the noise
between runs alone.

Refused: too few sizes; no effect beyond noise (p < 0.001); an exponent on the edge of its search; a shown interval that
is open or spans a factor of 3; a law without a power that describes the settings as well by AIC (:mod:`rivals`);
declared choices that disagree by a factor of 3; runs that cannot be compared (mixed protocols, copies, leaks, a size
that is no better than the mean of each gene). Approximate: lack of fit (p < 0.01); an exponent that moves by more than
noise when a size is left out; flagged runs, or a robust estimate, that move the answer within its interval; rates that
nobody compared.

Flags (undertrained runs, rates at an edge of those tried, settings that lost runs to divergence) are a sensitivity: the
law is fitted without the flagged runs and with them. The table is refused where the answer with them leaves the shown
interval, or where too few sizes are left without them; else both values are shown.

Robust. Settings that Huber's loss leaves far outside are set aside where they move an exponent beyond its statistical
interval; they are named, both estimates are shown, and the verdict is at most approximate.

Three numbers of cells answer within the form only: none can be left out and no rival can be told apart, so that the
verdict is at most approximate.

Predictions need no exponent. Loss at the next size, at ten times the largest and with twice the cells is given where
the largest size, held out, was predicted within its own interval; rivals widen the interval. What sizes and cells
bought inside the grid, and what more can buy at most (:mod:`contrasts`), needs no law at all and is always given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from scaling_ray.laws import gates
from scaling_ray.laws.gates import Refusal
from scaling_ray.laws.law import Fitted
from scaling_ray.laws.rivals import Rival, rivals_of

SUPPORTED, APPROXIMATE, REFUSED = "supported", "approximate", "refused"


@dataclass(frozen=True)
class Judged:
    """A fitted law, the refusals against it, and the doubts that leave it approximate."""

    law: Fitted
    refusals: Sequence[Refusal]
    doubts: Sequence[Refusal] = ()
    rivals: Sequence[Rival] = field(default=(), repr=False)

    @property
    def verdict(self) -> str:
        """``supported``, ``approximate`` or ``refused``."""
        return REFUSED if self.refusals else APPROXIMATE if self.doubts else SUPPORTED

    @property
    def answered(self) -> bool:
        """Whether it has parameters to show."""
        return not self.refusals

    @property
    def reasons(self) -> list[str]:
        """Why it is refused; or, where it is not, why it is approximate."""
        return [refusal.reason for refusal in self.refusals or self.doubts]

    @property
    def settles(self) -> list[str]:
        """Runs that would settle the reasons; of those that begin with the same sizes the first."""
        said: dict[str, str] = {}
        for refusal in self.refusals or self.doubts:
            said.setdefault(refusal.settles.partition(", ")[0], refusal.settles)
        return list(said.values())

    def of_axis(self, axis: str) -> Judged:
        """The same law, judged for the exponent of one axis alone."""
        return Judged(
            self.law,
            [refusal for refusal in self.refusals if refusal.axis in (None, axis)],
            [doubt for doubt in self.doubts if doubt.axis in (None, axis)],
            [rival for rival in self.rivals if rival.axis == axis],
        )


def judge(law: Fitted, protocol: Sequence[Refusal]) -> Judged:
    """Apply the gates to a fitted law; ``protocol`` holds the refusals by the protocol of its runs.

    Gates on the fit need its tests, so a law that was fitted for its estimates only is judged without them.
    """
    refusals = [*gates.count_gates(law.form, law.points), *protocol]
    if law.best is None:
        return Judged(law, [*refusals, gates.cannot_fix(law.form, law.points)])
    rivals = rivals_of(law) if law.tests is not None else []
    refusals += gates.fit_gates(law) + gates.rival_gates(law, rivals)
    return Judged(law, refusals, gates.fit_doubts(law), rivals)
