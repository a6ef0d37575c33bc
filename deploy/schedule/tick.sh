#!/bin/sh
# Submit the reproduction of one tick to a Ray head and wait for its verdict: tick.sh 2026-11-28
#
# cron gives a command next to no environment, so ~/.scaling-ray.env holds what this needs (docs/reproduction.md):
#   PATH                    with `ray` first
#   SCALING_RAY_HEAD        the head's jobs API, such as http://127.0.0.1:8265
#   RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH, a file that only you may read
#   SCALING_RAY_SPEC, SCALING_RAY_REFERENCE, SCALING_RAY_OUT, and SCALING_RAY_EVERY, seconds between ticks
#
# One at a time on this machine: a second one says that it is skipped and ends with 0. A driver that outlives its
# shell, or runs elsewhere, is kept out by the lease of SCALING_RAY_OUT.
set -eu
tick=$1
set -a
. "$HOME/.scaling-ray.env"
set +a
cd "$(dirname "$0")/../.."
commit=$(git rev-parse HEAD 2>/dev/null || true)
status=0
flock --nonblock --conflict-exit-code 5 "$HOME/.scaling-ray.lock" \
    ray job submit --address "$SCALING_RAY_HEAD" --working-dir . \
    --runtime-env-json "{\"env_vars\": {\"SCALING_RAY_COMMIT\": \"$commit\"}}" \
    -- python jobs/reproduce.py "$SCALING_RAY_SPEC" --against "$SCALING_RAY_REFERENCE" --out "$SCALING_RAY_OUT" \
    --tick "$tick" --every "$SCALING_RAY_EVERY" --max-age "$SCALING_RAY_EVERY" || status=$?
if [ "$status" -eq 5 ]; then
    echo "skipped: the reproduction before this one is still at work"
    exit 0
fi
exit "$status"
