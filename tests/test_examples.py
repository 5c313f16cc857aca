"""The notebooks in `examples/` run from top to bottom in an empty folder, and their stored outputs are small and name no machine."""

import json
import re

import pytest
from notebooks import EXAMPLES, executed

NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def test_stored_notebooks_were_executed_and_are_small():
    assert [path.stem for path in NOTEBOOKS] == ["new_ads_every_day", "your_catalogue_to_sids"]
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        assert len(text) < 40_000, path.name
        assert not re.search(r"/(root|home|tmp|work|Users)/", text), f"{path.name} names a folder of a machine"
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), f"{path.name} was not executed"
        kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
        assert kinds <= {"stream", "execute_result"} and any(cell["outputs"] for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    notebook = executed(path, tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
