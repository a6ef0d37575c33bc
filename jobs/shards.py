"""A Census to shards; submit it again to go on.

ray job submit --working-dir . -- python jobs/shards.py SPEC.toml --census URI --out DIR
"""

import sys

from output import run_verb

if __name__ == "__main__":
    # Beside the shards: whatever lies among them and is no shard counts as damage.
    run_verb(__doc__ or "", "shards build", sys.argv[1:], records=".jobs")
