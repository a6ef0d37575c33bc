"""What a fitted law is worth: supported, or refused with every reason and what would settle it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scaling_ray.laws import gates
from scaling_ray.laws.fitted import Fitted
from scaling_ray.laws.gates import Refusal


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
        """What would settle each reason, once."""
        return list(dict.fromkeys(refusal.settles for refusal in self.refusals))


def judge(law: Fitted, protocol: Sequence[Refusal]) -> Judged:
    """Set a law against the gates; ``protocol`` is what is wrong with the runs whatever law is drawn through them.

    The gates of the fit itself need its tests: a law that was fitted for its estimates only passes them unasked.
    """
    refusals = [*gates.count_gates(law.form, law.points), *protocol]
    if law.best is None:
        refusals.append(gates.cannot_fix(law.form, law.points))
    else:
        refusals += gates.fit_gates(law)
    return Judged(law, refusals)
