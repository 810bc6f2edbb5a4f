"""The README's Python snippets run."""

import re

import pytest
from conftest import ROOT

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(3))
def test_snippet_runs(number):
    assert len(SNIPPETS) == 3
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})
