"""A sweep repeated and compared with a reference; ends as the verdict does: 0 agrees, 3 drifted, 6 cannot tell.

ray job submit --working-dir . -- python jobs/reproduce.py SPEC.toml --against REF.json --out DIR
"""

import sys

from output import run_verb

if __name__ == "__main__":
    run_verb(__doc__ or "", "reproduce", sys.argv[1:])
