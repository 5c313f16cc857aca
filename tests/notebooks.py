"""Execution of the notebooks in `examples/` in an empty folder. `python tests/notebooks.py` writes their outputs anew."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
TIMEOUT = 900  # seconds per cell


def executed(path: Path, folder: Path):
    """The notebook after all its cells ran in `folder`, with what they printed and returned, but without progress bars.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its traceback.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        os.environ["PATH"] = before
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.metadata, cell.execution_count = {}, number + 1
        printed = "".join(one.text for one in cell.outputs if one.get("name") == "stdout")
        results = [one for one in cell.outputs if one.output_type == "execute_result"]
        text = without_progress(printed)
        cell.outputs = ([nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []) + results
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number + 1
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return notebook


def without_progress(printed: str) -> str:
    """What a command printed, without progress bars and colours."""
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", printed).replace("\r", "\n").split("\n")
    kept = [line for line in lines if line.strip() and "━" not in line]
    return "\n".join(kept) + "\n" if kept else ""


if __name__ == "__main__":
    import nbformat

    for one in sys.argv[1:] or sorted(EXAMPLES.glob("*.ipynb")):
        with tempfile.TemporaryDirectory() as scratch:
            nbformat.write(executed(Path(one), Path(scratch)), one)
