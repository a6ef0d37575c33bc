"""A sweep's report.

ray job submit --working-dir . -- python jobs/report.py SWEEP_DIR --out DIR
"""

import sys

from output import run_verb

if __name__ == "__main__":
    run_verb(__doc__ or "", "report", sys.argv[1:])
