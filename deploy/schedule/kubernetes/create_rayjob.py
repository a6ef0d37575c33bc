"""Create the RayJob of a tick: python create_rayjob.py rayjob.yaml, in a pod of a CronJob.

JOB_NAME is the name of the pod's Job, which ends in the minute since 1970 that the tick was due. The RayJob takes that
name, so that a second call for the tick finds it there and leaves it. KUBERNETES_API names another address of the API
than the pod's own (that of `kubectl proxy`, say), and then NAMESPACE its namespace.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


def tick_of(job_name: str, now: float) -> str:
    """When a Job was due, as --tick takes it; the present minute for one that was created by hand."""
    match = re.search(r"-(\d{7,9})$", job_name)
    seconds = int(match[1]) * 60 if match else int(now) // 60 * 60
    return time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime(seconds))


def rayjob_of(template: str, job_name: str, now: float) -> dict[str, Any]:
    """The RayJob of a tick."""
    job: dict[str, Any] = yaml.safe_load(template)
    job["metadata"]["name"] = job_name
    job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace("TICK", tick_of(job_name, now))
    return job


def create(job: dict[str, Any]) -> bool:
    """Create a RayJob through the API; False where one of its name is there already."""
    api = os.environ.get("KUBERNETES_API")
    context, headers = None, {"Content-Type": "application/json"}
    namespace = os.environ["NAMESPACE"] if api is not None else (ACCOUNT / "namespace").read_text()
    if api is None:
        api = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
        context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        headers["Authorization"] = f"Bearer {(ACCOUNT / 'token').read_text()}"
    url = f"{api}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
    request = urllib.request.Request(url, json.dumps(job).encode(), headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=30, context=context):
            return True
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 409:
                return False
            print(error.read().decode(errors="replace")[:2000], file=sys.stderr)
            raise


def main() -> None:
    """Create the RayJob of this pod's Job."""
    name = os.environ["JOB_NAME"]
    job = rayjob_of(Path(sys.argv[1]).read_text(), name, time.time())
    print(f"{name}: {'created' if create(job) else 'there already'}")


if __name__ == "__main__":
    main()
