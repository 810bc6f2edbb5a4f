"""Who may import whom.

octaves <- paths <- conv <- octavize <- models <- recognizer; data and the network side never meet, but in prediction,
which is there to bring a file and a network together in one call.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "octvideo"
NETWORK = ["octaves", "paths", "conv", "octavize", "models", "recognizer"]
ALLOWED = {
    "octaves": set(),
    "paths": {"octaves"},
    "conv": {"octaves", "paths"},
    "octavize": {"octaves", "conv"},
    "models": {"octaves", "conv", "octavize", "weights"},
    "recognizer": {"octaves", "conv", "octavize", "models", "normalization", "recomputation", "schedule"},
    "normalization": {"octaves"},
    "recomputation": {"octaves", "models"},
    "alphas": {"octavize", "models"},
    "checks": {"octaves"},
    "schedule": set(),
    "checkpoints": set(),
    "loggers": set(),
    "sharding": {"checkpoints"},
    "fuse": set(),
    "cost": set(),
    "weights": set(),
    "spectrum": {"octaves"},
    "maps": {"octaves", "models", "spectrum"},
    "allocation": {"cost", "octavize"},
    "trained": {"checkpoints", "models", "weights"},
    "report": {"cost", "models", "trained", "weights"},
    "prediction": {"trained", "data"},
    "callbacks": set(),
    "__init__": {*NETWORK, "fuse", "prediction"},
}


def imports(path):
    """The octvideo modules that a file imports, by their first name below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert "octvideo" not in names, f"{path} imports the whole package"
        found |= {name.split(".")[1] for name in names if name.startswith("octvideo.")}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"relative import in {path}"
    return found


def test_every_module_imports_only_what_lies_below_it():
    modules = list(PACKAGE.glob("*.py"))
    assert len(modules) >= 6
    for path in modules:
        assert imports(path) <= ALLOWED[path.stem], path


def test_data_imports_only_data():
    modules = list((PACKAGE / "data").glob("*.py"))
    assert len(modules) >= 6
    for path in modules:
        assert imports(path) <= {"data"}, path
