"""Run docs/demo.ipynb from top to bottom and write it again with what came out.

python docs/run_notebook.py
"""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

from maskgit.foundation import files

NOTEBOOK = Path(__file__).with_name("demo.ipynb")
SECONDS_A_CELL = 600


def run(notebook: NotebookNode) -> None:
    """Run a notebook in a kernel of this environment, and keep of its outputs what is worth keeping.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised an error.
    """
    # Sockets in the file system, which other users of the machine cannot listen to.
    config = Config({"KernelManager": {"transport": "ipc"}})
    NotebookClient(
        notebook, timeout=SECONDS_A_CELL, kernel_name="python3", coalesce_streams=True, config=config
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            # Pillow gives every picture as PNG and as JPEG.
            if "image/png" in data:
                data.pop("image/jpeg", None)
            if "text/plain" in data:
                data["text/plain"] = re.sub(r" at 0x[0-9A-F]+", "", data["text/plain"])


def main() -> None:
    """Run the notebook in place."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    run(notebook)
    files.write_bytes(NOTEBOOK, (nbformat.writes(notebook) + "\n").encode())


if __name__ == "__main__":
    main()
