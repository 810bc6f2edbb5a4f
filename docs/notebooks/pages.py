"""A hook of MkDocs: every notebook becomes a page with its outputs as they are in the file; nothing is executed.

Pages link to notebooks/NAME.ipynb, the file in the repository. In the built site such links lead to the notebook's
page, which offers the file.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\((?:notebooks/)?\w+)\.ipynb\)")


def page_of(name: str, notebook: dict[str, Any]) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by file name."""
    parts, pictures = [], dict[str, bytes]()
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(LINK.sub(r"\1.md)", source))
            continue
        magic, _, rest = source.partition("\n")
        parts.append(f"```bash\n{rest}\n```" if magic == "%%bash" else f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append("```text\n{}\n```".format("".join(output["text"]).rstrip("\n")))
            else:
                picture = f"{name}_{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![What the cell above draws]({picture})")
    title, _, rest = parts[0].partition("\n")
    download = f"This page is the notebook [{name}.ipynb]({name}.ipynb), to run it yourself."
    return "\n\n".join([title, download, rest.strip(), *parts[1:]]), pictures


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and their pictures."""
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        folder = Path(file.src_uri).parent
        text, pictures = page_of(Path(file.src_uri).stem, json.loads(file.content_string))
        for name, content in {f"{Path(file.src_uri).stem}.md": text, **pictures}.items():
            files.append(File.generated(config, (folder / name).as_posix(), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns other pages' links to notebooks into links to their pages."""
    return markdown if page.file.generated_by else LINK.sub(r"\1.md)", markdown)
