#!/usr/bin/env bash
# benchmarks/gpu.sh OUT [--cpu] [--commit SHA] [--spec FILE.toml ...]: the evidence that needs a GPU, into OUT/gpu.json.
# Eight minutes at most, on a machine with torch, numpy, scipy, pyarrow and pip, and nothing to install from. What else
# it lacks comes from wheels/, which `make gpu-wheels` fills (Linux on x86-64, Python 3.11 to 3.13): take that folder
# along. Without .git name the commit. PYTHON is the interpreter that has torch (python3).
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,5s/^# //p' "$0" >&2; exit 2; }
here="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-python3}"
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT

missing="$("$python" - "$here/benchmarks/gpu-wheels.txt" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version

for line in open(sys.argv[1]):
    name = line.strip()
    try:
        name.startswith("#") or version(name)
    except PackageNotFoundError:
        print(name)
PY
)"
install() {
    "$python" -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --no-index --no-deps \
        --find-links "$here/wheels" --target "$site" --upgrade "$@"
}
# all at once is faster; where one has no wheel (DeepSpeed need not build), one by one
[ -z "$missing" ] || install $missing || for name in $missing; do
    install "$name" || echo "no wheel of $name for this Python in wheels/: make gpu-wheels" >&2
done
export PYTHONPATH="$here:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" "$here/benchmarks/gpu.py" "$@"
