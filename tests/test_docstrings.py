import sys
from pathlib import Path

import pytest

from hm import docstrings
from hm.errors import UserError

LONG = "This sentence is long enough to be kept, and it is written in the plainest of English words."

SOURCE = f'''
"""{LONG} Module."""
import not_installed_anywhere

raise SystemExit("nobody imports this")

class Outer:
    """{LONG} Class.

        Indented.

    Not indented.
    """

    def method(self):
        """{LONG} Method."""
        if True:
            def inner():
                """{LONG} Inner."""

    async def awaited(self):
        r"""{LONG} \\d Async."""

def short():
    """Too short."""

def table():
    """{"0.123 | 4.567 | the of to" * 9}"""

def german():
    """Dieser Satz ist lang genug, doch keine der Funktionen hier spricht die Sprache, um die es geht."""

add_docstr(torch.abs, r"""
{LONG} Attached {{input}}.
""".format(**common))
add_newdoc("numpy", "ndarray", ("sort", """{LONG} Newdoc."""))
'''


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages in place of the installed ones: `alpha` for training and `beta` for validation."""
    for name in ("alpha", "beta"):
        (tmp_path / name / "tests").mkdir(parents=True)
        (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings, "PACKAGES", ("alpha", "absent_package"))
    monkeypatch.setattr(docstrings, "VALIDATION_PACKAGES", ("beta",))
    monkeypatch.setattr(docstrings, "MIN_BYTES", {"train": 1, "validation": 1})
    return tmp_path


def test_docstrings_come_in_source_order_under_their_qualified_names(tmp_path):
    (tmp_path / "m.py").write_text(SOURCE)
    assert docstrings.docstrings_of_file(str(tmp_path / "m.py")) == [
        ("", f"{LONG} Module."),
        ("Outer", f"{LONG} Class.\n\n    Indented.\n\nNot indented."),
        ("Outer.method", f"{LONG} Method."),
        ("Outer.method.inner", f"{LONG} Inner."),
        ("Outer.awaited", f"{LONG} \\d Async."),
        ("torch.abs", f"{LONG} Attached {{input}}."),
        ("numpy.ndarray", f"{LONG} Newdoc."),
    ]


@pytest.mark.parametrize("content", [b"def broken(:", b'x = """\0"""', b'"""\xff"""', b"(" * 5000 + b'"""'])
def test_a_file_that_python_cannot_parse_gives_nothing(tmp_path, content):
    (tmp_path / "m.py").write_bytes(content)
    assert docstrings.docstrings_of_file(str(tmp_path / "m.py")) == []


def test_a_module_is_a_document_and_no_package_is_imported(site):
    (site / "alpha" / "one.py").write_text(SOURCE)
    (site / "alpha" / "two.py").write_text(f'def f():\n    """{LONG} Two."""')
    (site / "alpha" / "tests" / "test_it.py").write_text(f'"""{LONG} Not this."""')
    first, second = docstrings.documents("train")
    assert first.startswith(f"alpha.one\n{LONG} Module.\n\nalpha.one.Outer\n{LONG} Class.")
    assert second == f"alpha.two.f\n{LONG} Two."
    assert "alpha" not in sys.modules


def test_a_docstring_is_kept_once_and_validation_has_the_first_claim(site):
    (site / "alpha" / "a.py").write_text(f'"""{LONG} Shared."""\ndef f():\n    """{LONG} Own."""')
    (site / "alpha" / "b.py").write_text(f'"""{LONG} Own."""')
    (site / "beta" / "a.py").write_text(f'"""{LONG} Shared."""')
    assert list(docstrings.documents("validation")) == [f"beta.a\n{LONG} Shared."]
    assert list(docstrings.documents("train")) == [f"alpha.a.f\n{LONG} Own."]


def test_many_files_on_many_processes_keep_their_order(site):
    for i in range(230):
        (site / "alpha" / f"m{i:03d}.py").write_text(f'"""{LONG} {i}."""')
    names = [text.split("\n")[0] for text in docstrings.documents("train")]
    assert names == [f"alpha.m{i:03d}" for i in range(230)]


def test_too_few_docstrings_are_an_error_that_says_what_to_do(site, monkeypatch):
    monkeypatch.setattr(docstrings, "MIN_BYTES", {"train": 1000, "validation": 1})
    (site / "alpha" / "a.py").write_text(f'"""{LONG}"""')
    with pytest.raises(UserError, match=r"only \d+ bytes of train docstrings.*data=PATH"):
        list(docstrings.documents("train"))


def test_training_and_validation_packages_are_disjoint():
    assert not set(docstrings.PACKAGES) & set(docstrings.VALIDATION_PACKAGES)


def test_the_fingerprint_names_installed_packages_with_their_versions():
    import numpy

    fingerprint = docstrings.fingerprint()
    assert fingerprint["numpy"] == numpy.__version__
    assert {"accelerate", "datasets", "python", "rules"} <= set(fingerprint)
    assert "unknown" not in fingerprint.values()


def test_the_installed_validation_packages_are_technical_english_of_half_a_megabyte_or_more():
    texts = list(docstrings.documents("validation"))
    assert sum(map(len, texts)) > 500_000
    assert {text.split(".")[0].split("\n")[0] for text in texts} == set(docstrings.VALIDATION_PACKAGES)
