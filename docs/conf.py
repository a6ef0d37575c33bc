"""The documentation site: Sphinx reads the Markdown pages of this folder, and the code for the reference.

`make docs` builds it to out/docs, warnings as errors, without a network.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
sys.path[:0] = [str(HERE), str(REPOSITORY)]

from scaling_ray import __version__  # noqa: E402

project = "scaling_ray"
author = "the scaling_ray authors"
release = __version__
html_title = "scaling_ray"
html_theme = "furo"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
# Quotes and dashes of commands stay as they are typed.
smartquotes = False

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code", "ran"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# The notebook is shown with the outputs that it is stored with; a test runs it.
nb_execution_mode = "off"
nb_merge_streams = True

nitpicky = True
# Types of other libraries, whose documentation is elsewhere: no network is asked for it.
# Short for names that the text explains.
nitpick_ignore = [("py:class", "Path"), ("py:class", "Source")]
FOREIGN = "numpy np pa pyarrow pandas pathlib collections argparse typing anndata pydantic".split()
nitpick_ignore_regex = [(r"py:.*", rf"({'|'.join(FOREIGN)})(\..*)?")]
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
exclude_patterns = ["tutorial", "**/.ipynb_checkpoints"]

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Page of the repository -> the page of the site that stands for it."""
OUTWARD = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?:\.\./)+(?P<path>[\w./-]+?)(?P<anchor>#[\w-]+)?\)")


def point_inward(app: Sphinx, docname: str, content: list[str]) -> None:
    """Turn links that leave this folder, right on GitHub, into ones of the site: its pages, and the kept reports."""
    up = "../" * docname.count("/")

    def link(match: re.Match[str]) -> str:
        path, anchor = match["path"], match["anchor"] or ""
        if path in PAGES:
            return f"[{match['text']}]({up}{PAGES[path]}{anchor})"
        if path.startswith("reports/"):
            return f'<a href="{up}{path}{anchor}">{match["text"]}</a>'
        return match[0]

    content[0] = OUTWARD.sub(link, content[0])


def keep_reports(app: Sphinx, failed: Exception | None) -> None:
    """Put the kept reports beside the pages, as they are."""
    if failed is None and app.builder.name == "html":
        shutil.copytree(REPOSITORY / "reports", Path(app.outdir) / "reports", dirs_exist_ok=True)


def setup(app: Sphinx) -> None:
    """Connect what this site does beside Sphinx's own steps."""
    app.connect("source-read", point_inward)
    app.connect("build-finished", keep_reports)
