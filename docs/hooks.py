"""Hooks of the documents' build: notebooks are run and become pages, roles become code.

A notebook is stored without results. Each build runs it in a fresh kernel, so its page shows what
this version prints, and a cell that fails is an error of the build.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.structure.files import File, Files
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

SECONDS = 300
"""For one cell. A whole notebook takes about 20 s on one idle core."""

ROLE = re.compile(r":(?:attr|class|func|meth|mod):<code>~?([\w.]+)</code>")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the page, and the pictures, of every notebook."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            made = run(Path(file.abs_src_path or "").read_text(), Path(file.src_uri).stem)
            folder = Path(file.src_uri).parent
            for name, content in made.items():
                files.append(File.generated(config, str(folder / name), content=content))
    return files


@functools.lru_cache
def run(notebook: str, name: str) -> dict[str, bytes]:
    """Run a notebook, given as JSON, in an empty folder.

    Returns:
        Content of the page ``name.md`` and of its pictures, by file name.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its traceback.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # the kernel inherits it: never wait for a hub
    book = nbformat.reads(notebook, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        where = {"metadata": {"path": folder}}
        NotebookClient(book, timeout=SECONDS, kernel_name="python3", resources=where).execute()
    for cell in book.cells:
        if cell.cell_type == "code":  # progress bars and the like; a warning is no result
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    pictures = {"unique_key": name, "output_files_dir": f"{name}_files"}
    exporter = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor(enabled=True)])
    page, made = exporter.from_notebook_node(book, resources=pictures)
    return {f"{name}.md": page.replace("![png]", "![Picture]").encode(), **made["outputs"]}


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name other objects by Sphinx roles; the pages show them as code."""
    return ROLE.sub(lambda found: f"<code>{found[1].rsplit('.', 1)[-1]}</code>", html)
