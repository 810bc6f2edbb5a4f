"""Who may import whom: the arrows between the package's folders, one row each."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "octvideo"
BASE = {"errors", "files", "stores"}
ALLOWED = {
    "layers": {"errors"},
    "models": {*BASE, "layers", "data.preprocessing"},
    "data": BASE,
    "training": {*BASE, "layers", "models", "data"},
    "evaluation": {*BASE, "layers", "models", "data"},
    "commands": {*BASE, "layers", "models", "data", "training", "evaluation"},
}


def imports(path):
    """The octvideo modules that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert "octvideo" not in names, f"{path} imports the whole package"
        found |= {name.removeprefix("octvideo.") for name in names if name.startswith("octvideo.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path}"
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_lies_below_it(folder):
    modules = list((PACKAGE / folder).rglob("*.py"))
    assert len(modules) > 4
    for path in modules:
        above = {
            name
            for name in imports(path)
            if not any(f"{name}.".startswith(f"{allowed}.") for allowed in {folder, *ALLOWED[folder]})
        }
        assert not above, path


def test_every_folder_has_its_row():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ALLOWED)


def test_layers_need_torch_alone():
    code = (
        "import sys\nfrom octvideo import OctConv3d\n"
        "foreign = {'lightning', 'torchvision', 'pytorchvideo', 'av', 'torchmetrics', 'jsonargparse', 'rich'}\n"
        "assert not foreign & set(sys.modules), foreign & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prediction_needs_neither_lightning_nor_torchmetrics():
    """torchmetrics imports transformers where that is installed, which warns of missing widgets in notebooks."""
    code = (
        "import sys, octvideo; octvideo.predict\n"
        "foreign = {'lightning', 'torchmetrics', 'transformers', 'tqdm.auto'}\n"
        "assert not foreign & set(sys.modules), foreign & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
