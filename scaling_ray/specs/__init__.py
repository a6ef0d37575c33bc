"""The example specs that come with the package, by name, and spec files with every key explained."""

from __future__ import annotations

from pathlib import Path

from scaling_ray.errors import BadInput

_FOLDER = Path(__file__).parent


def example_names() -> list[str]:
    """Names of the shipped examples, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def example_path(name: str) -> Path:
    """The file of a shipped example."""
    if name not in example_names():
        raise BadInput("S034", "NAME", name, f"is no example; use one of {', '.join(example_names())}")
    return _FOLDER / f"{name}.toml"


def about_example(name: str) -> str:
    """The first line of an example's opening comment."""
    return example_path(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def spec_path(given: str | Path) -> Path:
    """The spec that a command line names: a file, else the shipped example of that name.

    Raises:
        BadInput: neither.
    """
    path = Path(given)
    if path.is_file():
        return path
    if str(given) in example_names():
        return example_path(str(given))
    raise BadInput(
        "S035",
        "spec",
        str(given),
        f"is no file and no example; name a TOML file, or one of {', '.join(example_names())}",
    )
