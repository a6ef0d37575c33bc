"""deploy/Dockerfile, which no test builds: its versions are those of constraints.txt, and it holds no secret."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
DOCKERFILE = REPOSITORY / "deploy" / "Dockerfile"
DOCKERIGNORE = REPOSITORY / "deploy" / "Dockerfile.dockerignore"


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments on one line), in their order; comments are left out."""
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    lines = [" ".join(line.split()) for line in code.replace("\\\n", " ").splitlines() if line.strip()]
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in lines)]


def pins() -> dict[str, str]:
    """Package -> its version in constraints.txt; names as pip compares them."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    found = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def installs(text: str) -> list[list[str]]:
    """The words after each `pip install`."""
    runs = [rest for name, rest in instructions(text) if name == "RUN"]
    return [
        shlex.split(run)[shlex.split(run).index("install") + 1 :] for run in runs if re.search(r"\bpip install", run)
    ]


def complaints(text: str) -> list[str]:
    """What is wrong with a Dockerfile's versions and users, one line each."""
    found = []
    for words in installs(text):
        for word in words:
            name, equal, version = word.partition("==")
            if equal and pins().get(re.sub(r"[-_.]+", "-", name).lower()) != version:
                found.append(f"{word} is not the version of constraints.txt")
        if ["--constraint", "constraints.txt"] != words[words.index("--constraint") : words.index("--constraint") + 2]:
            found.append(f"pip install {' '.join(words)} is not constrained")
    images = re.findall(r"rayproject/ray:([^\s-]+)-(py\d+)-", text)
    if not images or set(images) != {(pins()["ray"], "py311")}:
        found.append("the image is not that of the Ray and the Python of constraints.txt")
    users = [rest for name, rest in instructions(text) if name == "USER"]
    if not users or users[-1] != "ray":
        found.append("the image runs as root")
    if any(name == "ADD" for name, _ in instructions(text)):
        found.append("ADD fetches what nobody checked")
    if re.search(r"(?i)(token|secret|password|key)\w*=(?!token\b)\S", " ".join(r for _, r in instructions(text))):
        found.append("a secret stands in the image")
    return found


def test_the_images_versions_are_the_committed_ones() -> None:
    text = DOCKERFILE.read_text()
    assert complaints(text) == []
    named = {word.partition("==")[0] for words in installs(text) for word in words if "==" in word}
    assert {"torch", "deepspeed"} <= named
    assert installs(text)[-1][-1] == ".[all]"
    assert "--no-build-isolation" in next(words for words in installs(text) if "deepspeed==0.19.8" in words)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("torch==2.13.0", "torch==2.12.0", "torch==2.12.0 is not"),
        ("rayproject/ray:2.60.0-py311-cpu", "rayproject/ray:2.59.0-py311-cpu", "not that of the Ray"),
        ("--constraint constraints.txt torch", "--constraint other.txt torch", "is not constrained"),
        ("USER ray", "USER root", "runs as root"),
        ("WORKDIR", "ADD https://example.org/x.tar /x\nWORKDIR", "ADD fetches"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=0123abcd", "a secret"),
    ],
)
def test_the_lint_can_fail(old: str, new: str, complaint: str) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    assert any(complaint in line for line in complaints(text.replace(old, new)))


def test_what_is_copied_is_there_and_may_go_along() -> None:
    allowed = [line[1:] for line in DOCKERIGNORE.read_text().splitlines() if line.startswith("!")]
    first = next(line for line in DOCKERIGNORE.read_text().splitlines() if line and not line.startswith("#"))
    assert first == "**", "a list of what may go along begins by leaving everything out"
    for name, rest in instructions(DOCKERFILE.read_text()):
        if name == "COPY":
            for source in [word for word in rest.split() if not word.startswith("--")][:-1]:
                assert (REPOSITORY / source).exists(), source
                assert any(rule == source or rule.startswith(f"{source}/") for rule in allowed), source
    for rule in allowed:
        assert list(REPOSITORY.glob(rule)), f"{rule} matches nothing"
        assert Path(rule).suffix in {".py", ".toml", ".html", ".typed", ".txt", ".md", ""}, rule
        assert Path(rule).suffix or Path(rule).name == "LICENSE", f"{rule} lets whole folders in"
