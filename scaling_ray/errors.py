"""The package's exception tree. Every verb turns these, and only these, into one line and an exit code."""

from __future__ import annotations


class ScalingRayError(Exception):
    """Root of everything this package raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class BadInput(ScalingRayError, ValueError):
    """Something the user gave is wrong: names the field, the value found and the way out, on one line."""

    exit_code = 2

    def __init__(self, field: str, value: object, remedy: str) -> None:
        self.field, self.value, self.remedy = field, value, remedy
        shown = repr(value)
        if len(shown) > 120:
            shown = shown[:117] + "..."
        super().__init__(" ".join(f"{field}: {shown}: {remedy}".split()))

    def __reduce__(self) -> tuple[type[BadInput], tuple[str, object, str]]:
        # Exceptions travel between processes pickled, and by default would be rebuilt from the message alone.
        return type(self), (self.field, self.value, self.remedy)


class DamagedFiles(ScalingRayError):
    """A shard directory does not hold what its manifest promises; ``problems`` names each file."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))

    def __reduce__(self) -> tuple[type[DamagedFiles], tuple[list[str]]]:
        return type(self), (self.problems,)


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

    def __init__(self, message: str, node_gone: bool) -> None:
        self.message, self.node_gone = message, node_gone
        super().__init__(message)

    def __reduce__(self) -> tuple[type[Lost], tuple[str, bool]]:
        return type(self), (self.message, self.node_gone)


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
