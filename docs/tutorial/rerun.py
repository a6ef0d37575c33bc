"""Run the commands of docs/tutorial.md on the real cells and keep what they print, for the page to show.

    python docs/tutorial/rerun.py CELLS.h5ad WORK_DIR

Each `sh` block of the page is run in WORK_DIR, in order; the block of the page below it names the file that its output
goes to. WORK_DIR is a new folder, or one that a call left behind: every command goes on or is repeated.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "tutorial.md"
STEP = re.compile(r"```sh\n(?P<commands>.*?)```\n\n```\{literalinclude\} tutorial/(?P<kept>[\w.-]+)\n", re.DOTALL)
TIME_OF_DAY = re.compile(r"^\d\d:\d\d:\d\d ", re.MULTILINE)


def main(cells: Path, work: Path) -> None:
    """Run every step of the page; CalledProcessError where a command fails."""
    work.mkdir(parents=True, exist_ok=True)
    name = work / "bone-marrow.h5ad"
    if not name.exists():
        name.symlink_to(cells.resolve())
    shutil.copy(HERE / "bone-marrow.toml", work)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for step in STEP.finditer(PAGE.read_text(encoding="utf-8")):
        print(step["commands"].strip(), flush=True)
        done = subprocess.run(
            ["bash", "-ec", step["commands"]],
            cwd=work,
            env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, flush=True)
        done.check_returncode()
        said = TIME_OF_DAY.sub("", done.stdout).replace(str(work.resolve()), "/data")
        (HERE / step["kept"]).write_text(said, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
