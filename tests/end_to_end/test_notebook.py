"""The notebook, from top to bottom as outside Colab, on a few images of the demo."""

import json
import re

import nbformat
import pytest
from helpers import PATIENCE, ROOT
from nbclient import NotebookClient

from flags import build_parser
from images import demo
from run.files import read_rows

NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"
TINY_FLAGS = "--image_size 32 --epochs 1 --batch_size 8 --no-pretrained --num_workers 0 --amp off"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters_of(notebook):
    """-> (position of the cell of variables, {variable: value})."""
    ((position, cell),) = [(i, c) for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    values = {}
    exec(cell.source, values)
    return position, {name: value for name, value in values.items() if name.isupper()}


def test_all_cells_run_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "IMAGES_PER_GRADE", (10, 5))
    data, run_dir = demo.write_demo_data(tmp_path / "사진 folder", seed=0), tmp_path / "run"
    position, names = parameters_of(notebook)
    values = {"PHOTOGRAPHS": data, "RUN": str(run_dir), "FLAGS": TINY_FLAGS}
    assert values.keys() < names.keys()
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(position + 1, nbformat.v4.new_code_cell(source))
    # started in its own folder, as Jupyter does
    client = NotebookClient(
        notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}
    )
    client.execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    test_images = json.loads((run_dir / "splits.json").read_text())["test"]
    assert re.search(r"^test \{'balanced_acc': [01]\.\d+", printed, re.M)
    assert len(re.findall(r"^patch_\d+\.jpg: [01] \([01]\.\d\d\)", printed, re.M)) == len(test_images) > 0
    assert [row["path"] for row in read_rows(run_dir / "predictions.csv")] == test_images
    # nothing of what only Colab needs
    assert not {"git", "pip"} & set(re.findall(r"\w+", printed.lower())) and not (ROOT / "skin-grading").exists()


def test_the_notebook_is_stored_without_outputs_and_starts_with_its_variables(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    _, values = parameters_of(notebook)
    assert code[0].metadata["tags"] == ["parameters"] and code[0].source.startswith("REPOSITORY = ")
    build_parser().parse_args(values["FLAGS"].split())


def test_what_only_colab_has_is_used_only_there(notebook):
    for cell in notebook.cells:
        for line in cell.source.splitlines() if cell.cell_type == "code" else ():
            if re.search(r"google\.colab import|!git|!pip|!apt|files\.|drive\.", line):
                assert line.startswith("    ") and "if IN_COLAB" in cell.source, line


def test_its_links_resolve(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)
