"""The notebooks of the docs run, offline, and print what is committed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))


FIGURES = re.compile(r"[\d.,]+(e-\d+)?|positive|negative|place|story|\s+|-")


def outputs(notebook) -> list[str]:
    """What each cell gave: what it printed, without figures, which differ between machines; or the kind of output."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [FIGURES.sub("", "".join(out.get("text", out.output_type) for out in given)) for given in cells]


@pytest.mark.full
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_gives_what_is_committed(file):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    committed = nbformat.read(file, as_version=4)
    again = nbformat.read(file, as_version=4)
    # A warning on stderr is another's, and differs between environments.
    nbclient.NotebookClient(again, timeout=1800, resources={"metadata": {"path": str(file.parent)}}).execute()
    for cell in again.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    assert outputs(again) == outputs(committed)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_committed_with_outputs_and_without_paths(file):
    text = file.read_text()
    assert len(text) < 400_000
    assert '"output_type": "execute_result"' in text or '"output_type": "stream"' in text
    assert '"name": "stderr"' not in text
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


def test_there_are_notebooks():
    assert {file.stem for file in NOTEBOOKS} == {"quickstart", "fisher_masks"}
