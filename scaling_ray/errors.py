"""The package's exception tree. Every verb turns these, and only these, into one line and an exit code.

An error carries a code of its own: a letter for what it is about and three digits, written where it is raised. The code
ends its line, stays when the words change or the function moves, and is never given to another refusal.
``docs/errors.md`` lists all of them.
"""

from __future__ import annotations

from collections.abc import Mapping

EXIT_CODES: Mapping[int, str] = {
    0: "complete, whole, or agrees",
    1: "some runs failed, files are damaged, or a service does not answer",
    2: "bad input: one line names the field, the value and the way out",
    3: "drifted from the reference",
    4: "the budget is spent; a higher one goes on",
    5: "another driver holds the directory",
    6: "cannot tell whether it agrees",
    75: "stopped on the way, everything saved: call again",
    130: "stopped from the keyboard (Ctrl-C): the same command goes on",
}
"""What every verb and job returns -> what it means."""

FAMILIES: Mapping[str, str] = {
    "C": "cells: files, genes, donors, a Census",
    "D": "shards: what is converted, split and read",
    "S": "specs and sizes",
    "T": "tables of runs and the laws fitted to them",
    "W": "sweeps: files, plan, queue, nodes, budget",
    "M": "models: training, checkpoints, export, embedding",
    "P": "places where files lie: disks, S3, leases",
    "K": "tracking in MLflow",
    "R": "reports and repetitions",
    "V": "the command line and what is installed",
}
"""The letter that a code begins with -> what its refusals are about."""


class ScalingRayError(Exception):
    """Root of everything this package raises on purpose; ``exit_code`` is what the command line returns.

    ``code`` names the refusal, ``said`` is its line without the code.
    """

    exit_code = 1

    def __init__(self, code: str, said: str) -> None:
        self.code, self.said = code, said
        super().__init__(code, said)

    def __str__(self) -> str:
        return f"{self.said} [{self.code}]"


class BadInput(ScalingRayError, ValueError):
    """Something the user gave is wrong: names the field, the value found and the way out, on one line."""

    exit_code = 2

    def __init__(self, code: str, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(code, " ".join(f"{field}: {shown}: {remedy}".split()))

    def __reduce__(self) -> tuple[type[BadInput], tuple[str, str, object, str]]:
        # Exceptions travel between processes pickled, and by default would be rebuilt from the message alone.
        return type(self), (self.code, self.field, self.value, self.remedy)


class BadCall(ScalingRayError):
    """A command line that a verb does not take."""

    exit_code = 2


class DamagedFiles(ScalingRayError):
    """A shard directory does not hold what its manifest promises; ``problems`` names each file."""

    def __init__(self, code: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__(code, "; ".join(problems))

    def __reduce__(self) -> tuple[type[DamagedFiles], tuple[str, list[str]]]:
        return type(self), (self.code, self.problems)


class RunsFailed(ScalingRayError):
    """Some runs of a sweep have no result; the others do."""


class LeaseHeld(ScalingRayError):
    """Another driver works on this directory."""

    exit_code = 5


class ClusterUnreachable(ScalingRayError):
    """No Ray answers, or not for who asks (a token that is missing or wrong), or it does not know the node yet."""


class Diverged(ScalingRayError):
    """A run's loss or gradient became NaN or infinite."""


class Stalled(ScalingRayError):
    """A process made no progress: the note of each rank says what it was doing."""


class Lost(ScalingRayError):
    """A process of a run went away with its work unfinished; ``node_gone``: so did its whole node."""

    def __init__(self, code: str, said: str, node_gone: bool) -> None:
        self.node_gone = node_gone
        super().__init__(code, said)

    def __reduce__(self) -> tuple[type[Lost], tuple[str, str, bool]]:
        return type(self), (self.code, self.said, self.node_gone)


class StorageFailed(ScalingRayError):
    """Nothing can be written where a sweep keeps its files: a full disk, a read-only mount. What was done is saved."""

    exit_code = 75


class MemoryShort(ScalingRayError):
    """A node has too little memory for a task of the driver's own. What was done is saved."""

    exit_code = 75


class BudgetSpent(ScalingRayError):
    """A sweep has used what ``[budget]`` gives it; everything is saved, and a higher budget goes on."""

    exit_code = 4


class Preempted(ScalingRayError):
    """Asked to stop (SIGTERM, or a node that is about to go): what was done is saved, and the same call goes on."""

    exit_code = 75


class Interrupted(Preempted):
    """The same from the keyboard (SIGINT)."""

    exit_code = 130
