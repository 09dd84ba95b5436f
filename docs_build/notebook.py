"""Run the example notebook on the CPU and store its outputs: `python docs_build/notebook.py`.

Needs `pip install nbclient ipykernel`, and takes a minute or two.
"""

import os
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebooks" / "first_lora.ipynb"


def main() -> None:
    os.environ.update({"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""})
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":  # without progress bars
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [output for output in kept if output.output_type != "display_data"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # the PNG again
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
