"""The whole path as one job: Census, shards, sweep and report below OUT; submit it again to go on.

ray job submit --working-dir . -- python jobs/sweep.py jobs/demo.toml --out /shared/demo
"""

import sys

from output import run_verb

if __name__ == "__main__":
    run_verb(__doc__ or "", "run", sys.argv[1:])
