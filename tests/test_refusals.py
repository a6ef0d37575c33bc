"""Codes of refusals: each place has one of its own, the line ends with it, and docs/errors.md lists it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_layers import REPOSITORY

from scaling_ray import errors, refusals
from scaling_ray.cli import main
from scaling_ray.errors import EXIT_CODES, BadInput, ScalingRayError
from scaling_ray.spec import parse_spec

PAGE = REPOSITORY / "docs" / "errors.md"
FOLDERS = refusals.sources_here()


def test_every_refusal_has_a_code_of_its_own() -> None:
    assert len(list(refusals.sites(FOLDERS))) > 350, "the scan sees no refusals: it is looking in the wrong place"
    assert refusals.complaints(FOLDERS) == []


def test_the_page_is_what_the_source_says(tmp_path: Path) -> None:
    assert refusals.main([str(PAGE), "--check"]) == 0, "run `make errors`"
    old = tmp_path / "errors.md"
    old.write_text(PAGE.read_text().replace("C001", "C999"))
    assert refusals.main([str(old), "--check"]) == 1
    assert refusals.main([str(old)]) == 0 and old.read_text() == PAGE.read_text()


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ('raise BadInput("--out", out, "is a file; name a directory")', "begins with '--out'"),
        ("raise BadInput(code, field, 3, remedy)", "begins with code"),
        ('raise BadInput("c1", field, 3, remedy)', "begins with 'c1'"),
        ('raise BadInput("W900", field, 3, remedy)', "W900 is that of package/taken.py:2"),
        ('problem = LeaseHeld("W900", "held")', "W900 is that of"),
        ('raise Mine("gone")', "begins with 'gone'"),
        ('raise errors.DamagedFiles(["gone"])', "begins with ['gone']"),
        ('raise BadInput("W901", field, 3, remedy)', "W901 was that of a refusal that is gone"),
    ],
)
def test_a_planted_site_is_reported(code: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scaling_ray.refusals.listing.RETIRED", frozenset({"W901"}))
    package = tmp_path / "package"
    package.mkdir()
    (package / "taken.py").write_text('def f():\n    raise BadInput("W900", "x", 1, "no; yes")\n')
    (package / "wrong.py").write_text(f"class Mine(ScalingRayError):\n    pass\n\n\ndef g():\n    {code}\n")
    (found,) = refusals.complaints([package])
    assert found.startswith("package/wrong.py:6") and complaint in found
    assert refusals.next_code([package], "W") == "W902"


def test_a_code_that_is_passed_on_is_no_new_one(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("def f(error):\n    raise BadInput(error.code, error.field, 1, error.remedy)\n")
    assert refusals.complaints([package]) == [] and refusals.refusals([package]) == []


def test_the_words_are_read_from_the_source(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text(
        """
_WAY = "name another"

def f(path, n):
    remedy = f"holds {len(path)} files"
    if n:
        remedy = f"{remedy}"
        raise BadInput("P901", f"{path.name}: place", path, f"is a file (of {n}; or so); {_WAY}")
    remedy = "is gone; find it" if n else "is here; leave it"
    raise BadInput("P902", "--out", None, remedy)

def g():
    raise LeaseHeld("P903", held(3))
"""
    )
    file, gone, held = refusals.refusals([package])
    assert (file.about, file.cause, file.way_out) == (
        "{name}: place: {path}",
        "is a file (of {n}; or so)",
        "name another",
    )
    assert (gone.cause, gone.way_out) == ("is gone | is here", "find it | leave it")
    assert (held.exit_code, held.cause) == (5, "Another driver works on this directory")
    assert (held.where, file.where) == ("package/a.py g", "package/a.py f")


def test_every_entry_says_what_to_do() -> None:
    listed = refusals.refusals(FOLDERS)
    assert {refusal.code[0] for refusal in listed} == set(errors.FAMILIES)
    for refusal in listed:
        assert refusal.cause and refusal.way_out, refusal.code
        assert refusal.where.split(" ")[0].endswith(".py") and refusal.exit_code in EXIT_CODES


def test_every_class_has_a_listed_exit_code() -> None:
    classes = [each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, ScalingRayError)]
    assert len(classes) > 10 and all(each.exit_code in EXIT_CODES for each in classes)
    assert sorted(EXIT_CODES) == [0, 1, 2, 3, 4, 5, 6, 75, 130]


@pytest.mark.parametrize(
    "arguments",
    [["plan", "absent.toml"], ["fit", "absent.csv", "--out", "fit.json"], ["status", "absent"], ["run", "--out", "x"]],
    ids=lambda arguments: arguments[0],
)
def test_a_line_ends_with_a_code_that_the_page_has(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    line = capsys.readouterr().err.rstrip("\n")
    assert line.startswith("scaling-ray: ") and "\n" not in line
    code = re.search(r" \[([A-Z]\d{3})\]$", line)
    assert code and f'<a id="{code[1].lower()}"></a>{code[1]} |' in PAGE.read_text()


def test_a_refusal_that_is_passed_on_keeps_its_code() -> None:
    sizes = '[sizes.A]\nwidth = 3\nlayers = 1\nheads = 2\nfeedforward = 1\n[grid]\nsizes = ["A"]\n'
    text = f'name = "x"\n[data]\ngenes = 8\n{sizes}genes = [8]\ncells = ["all"]\nseeds = [1]\n[lr]\nrates = [1e-3]\n'
    with pytest.raises(BadInput, match=r"sizes.A.width.*\[S002\]$"):
        parse_spec(text)
