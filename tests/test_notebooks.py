"""The notebooks of docs/ run from top to bottom, and the files hold the outputs of such a run, and nothing odd."""

import importlib.util
import json
import re

import nbformat
import pytest
from conftest import ROOT, long
from notebooks import NOTEBOOKS, run, tidied

# What makes each small: texts that it has once, and what replaces them.
SMALL = {
    "octavize": {
        "torch.randn(1, 3, 8, 112, 112)": "torch.randn(1, 3, 8, 32, 32)",
        "alphas = (0, 0.125, 0.25, 0.5, 0.75)": "alphas = (0, 0.5)",
    },
    "train": {
        "CLIPS = 40": "CLIPS = 4",
        "--trainer.max_epochs 4": "--trainer.max_epochs 1 --model.width 8 --data.num_workers 0 --data.crop_size 32 "
        "--data.short_side '[32, 36]' --data.test_crop_size 32 --data.test_clips 1",
    },
    "look_inside": {"CLIPS, STEPS = 256, 60": "CLIPS, STEPS = 16, 4", "make_clips(64, ": "make_clips(8, "},
}
LARGEST = 300_000  # bytes; GitHub shows no more than a few MB, and pages should open at once
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
NOTEBOOKS_TO_RUN = [path if path.stem == "octavize" else long(path) for path in NOTEBOOKS]


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_all_have_their_small_form():
    assert {path.stem for path in NOTEBOOKS} == set(SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS_TO_RUN, ids=lambda path: path.stem)
def test_it_runs_from_top_to_bottom(path, tmp_path):
    text = path.read_text()
    for large, small in SMALL[path.stem].items():
        assert text.count(large) == 1, large
        text = text.replace(large, small)
    notebook = nbformat.reads(text, as_version=4)
    cells = code_of(notebook)
    had = [{output.output_type for output in cell.outputs} for cell in cells]
    for cell in cells:
        cell.outputs = []
    run(notebook, tmp_path)  # raises where a cell does
    assert [{output.output_type for output in tidied(cell.outputs)} for cell in cells] == had


@every_notebook
def test_it_was_run_in_order_and_has_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_of(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) > len(cells) / 2
    for output in outputs:
        assert output.output_type in ("stream", "display_data")  # no errors
        assert output.get("name", "stdout") == "stdout"  # no warnings
        assert output.output_type == "stream" or "image/png" in output.data
    assert any(output.output_type == "display_data" for output in outputs)
    assert "pip install octvideo" in notebook.cells[0].source


@every_notebook
def test_it_tells_nothing_of_the_machine_that_ran_it_and_is_small(path):
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook.metadata == {"kernelspec": kernel, "language_info": {"name": "python"}}
    assert all(cell.metadata == {} for cell in notebook.cells)
    for cell in code_of(notebook):
        for output in cell.outputs:
            output.get("data", {}).pop("image/png", None)
    text = nbformat.writes(notebook)
    assert not re.search(r"/(tmp|work|home|root|Users|opt|usr)/|site-packages|\\u001b|Warning", text)


@every_notebook
def test_links_lead_to_pages_and_notebooks(path):
    notebook = nbformat.read(path, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert len(links) > 3
    assert [link for link in links if not (path.parent / link.partition("#")[0]).is_file()] == []


def test_its_page_has_all_cells_outputs_and_pictures():
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "notebooks" / "pages.py")
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        page, pictures = pages.page_of(path.stem, notebook)
        shown = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
        drawn = [output for output in shown if output["output_type"] == "display_data"]
        assert len(pictures) == len(drawn)
        for name, picture in pictures.items():
            assert f"]({name})" in page
            assert picture.startswith(b"\x89PNG")
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert "".join(cell["source"]).removeprefix("%%bash\n") in page
        for output in shown:
            assert "".join(output.get("text", [])).rstrip("\n") in page
        assert re.findall(r"\]\((?:\.\./)?\w+\.ipynb\)", page) == [f"]({path.name})"]  # to run it yourself
