"""The verdict on a fitted law: supported, or refused, with every reason and the runs that would settle it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling_ray.laws import gates
from scaling_ray.laws.gates import Refusal
from scaling_ray.laws.law import Fitted


@dataclass(frozen=True)
class Judged:
    """A fitted law and the refusals against it."""

    law: Fitted
    refusals: Sequence[Refusal]

    @property
    def verdict(self) -> str:
        """``supported`` or ``refused``."""
        return "refused" if self.refusals else "supported"

    @property
    def reasons(self) -> list[str]:
        """Why it is refused."""
        return [refusal.reason for refusal in self.refusals]

    @property
    def settles(self) -> list[str]:
        """Runs that would settle the reasons, each said once."""
        return list(dict.fromkeys(refusal.settles for refusal in self.refusals))


def judge(law: Fitted, protocol: Sequence[Refusal]) -> Judged:
    """Apply the gates to a fitted law; ``protocol`` holds the refusals by the protocol of its runs.

    Gates on the fit need its tests, so a law that was fitted for its estimates only is judged without them.
    """
    refusals = [*gates.count_gates(law.form, law.points), *protocol]
    if law.best is None:
        refusals.append(gates.cannot_fix(law.form, law.points))
    else:
        refusals += gates.fit_gates(law)
    return Judged(law, refusals)
