"""The notebook of the site: it runs, and says what the kept outputs say."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
NOTEBOOK = DOCS / "notebook.ipynb"
LARGEST_BYTES = 64 << 10

RUN = """
import sys
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

notebook, docs, folder = sys.argv[1:]
run = nbformat.read(notebook, as_version=4)
# over files in a folder, not over a port
kernel = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
NotebookClient(run, km=kernel, timeout=120, resources={"metadata": {"path": docs}}).execute()
nbformat.write(run, f"{folder}/run.ipynb")
"""


def said(notebook: Any) -> list[list[str]]:
    """What each cell of code printed or showed, as text."""
    return [
        [output["text"] if output.output_type == "stream" else output.data["text/plain"] for output in cell.outputs]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_kept_notebook_is_small_whole_and_of_no_machine() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < LARGEST_BYTES
    assert all(said(notebook)), "a cell without an output: run it, and keep what it shows"
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert str(DOCS.parent) not in text and "/home/" not in text and "/tmp/" not in text


@pytest.mark.slow
def test_it_runs_and_says_what_is_kept() -> None:
    # in a process of its own: sockets of the client are left to the garbage collector, which warns;
    # in a folder of a short name: the path of a socket has 107 characters at most
    with tempfile.TemporaryDirectory(prefix="nb-") as folder:
        path = os.pathsep.join([str(DOCS.parent), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, "-c", RUN, str(NOTEBOOK), str(DOCS), folder],
            env=os.environ | {"PYTHONPATH": path, "JUPYTER_RUNTIME_DIR": folder, "IPYTHONDIR": folder},
            check=True,
            timeout=300,
        )
        run = nbformat.read(Path(folder) / "run.ipynb", as_version=4)
    assert said(run) == said(nbformat.read(NOTEBOOK, as_version=4))
