"""Give a tracked sweep's parent run its verdict and report; MLflow is imported only where there is one to tell."""

from __future__ import annotations

from collections.abc import Callable

from scaling_ray.errors import LeaseHeld, ScalingRayError
from scaling_ray.extras import missing_modules
from scaling_ray.results.sweep_files import LEASE, SweepFiles
from scaling_ray.runs import runs_of
from scaling_ray.storage import Place, fenced, open_place
from scaling_ray.tracking.ledger import read_tracked, tracking_uri
from scaling_ray.tracking.story import read_report


def track_report(sweep: SweepFiles, report: Place | str, say: Callable[[str], None]) -> str | None:
    """Log verdict, law, description and files of a report to the parent run of its sweep, under the sweep's lease.

    The same report again changes nothing. Nothing is logged for a sweep that is not tracked. Whatever a tracking server
    does costs no report: what went wrong is said in one line that names the command that logs it later.

    Args:
        sweep: the sweep's files.
        report: where ``build_report`` wrote its report.
        say: takes that line.

    Returns:
        one line that says where to look at it, or None.
    """
    if missing_modules("track") or tracking_uri(sweep) is None or read_tracked(sweep.place) is None:
        return None
    from scaling_ray.tracking.tracker import replay

    place = open_place(report, "report")
    try:
        told = read_report(place, sweep)
        spec = sweep.spec()
        with sweep.place.lease(LEASE, say) as lease:
            under = SweepFiles(fenced(sweep.place, lease))
            return replay(under, spec, sweep.known_manifest(), runs_of(spec), told=told)
    except LeaseHeld:
        say("verdict and report are not in MLflow yet: another driver works on this sweep")
    except ScalingRayError as error:
        say(f"verdict and report are not in MLflow yet ({error}); `scaling-ray track replay {sweep} --report {place}`")
    return None


def report_beside(sweep: SweepFiles) -> str | None:
    """Where ``scaling-ray run`` puts a sweep's report: the folder "report" beside it, None for a sweep of its own."""
    above, slash, _ = str(sweep).rstrip("/").rpartition("/")
    return f"{above}/report" if slash and above else None
