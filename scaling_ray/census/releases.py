"""Releases of the public Census: which is the newest one that will be kept. Asked only, never taken."""

from __future__ import annotations

from dataclasses import dataclass

import cellxgene_census
import requests

from scaling_ray.errors import BadInput


@dataclass(frozen=True)
class Release:
    """One release: its build ("2025-11-08", as ``--census`` takes it) and the day it came out."""

    build: str
    date: str | None


def newest_release() -> Release:
    """The newest release with long-term support ("stable").

    Raises:
        BadInput: the directory of releases cannot be reached, or cannot be read.
    """
    try:
        told = cellxgene_census.get_census_version_description("stable")
    except requests.RequestException as error:
        raise BadInput(
            "C045", "census", "stable", "the directory of releases cannot be reached; check the network"
        ) from error
    except (ValueError, KeyError) as error:
        raise BadInput("C046", "census", "stable", "the directory of releases cannot be read; try later") from error
    return Release(str(told["release_build"]), told["release_date"])
