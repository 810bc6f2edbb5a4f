"""The tables of the docs are what the kept results say."""

import re

import pytest
import tables

PAGES = {path.name: path.read_text() for path in sorted(tables.DOCS.glob("*.md"))}


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if tables.MARK.search(text)])
def test_pages_say_what_was_measured(page):
    assert tables.written(PAGES[page]) == PAGES[page], "run: python experiments/tables.py"


def test_every_table_has_its_place():
    named = [found["name"] for text in PAGES.values() for found in tables.MARK.finditer(text)]
    assert sorted(named) == sorted(tables.TABLES)
    marks = sum(len(re.findall("<!-- results:", text)) for text in PAGES.values())
    assert marks == len(named), "a mark is not above a table, or at the start of its line"


def test_what_differs_is_written_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tables, "DOCS", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("Before.\n\n<!-- results: budget -->\n\n| | before |\n|---|---|\n| steps | 7 |\n\nAfter.\n")
    assert tables.main(["--check"]) == 1
    assert capsys.readouterr().out == "to write: page.md\n"
    assert "| steps | 7 |" in page.read_text()
    assert tables.main([]) == 0
    text = page.read_text()
    assert text.startswith(
        "Before.\n\n<!-- results: budget -->\n\n| I3D, 8 x 224 x 224 | before | under load | after |\n|---|"
    )
    assert text.endswith(" |\n\nAfter.\n")
    assert tables.main(["--check"]) == 0
    assert not re.search("steps \\| 7", text)
