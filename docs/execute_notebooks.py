"""Executes the notebooks and writes them back with their outputs: python docs/execute_notebooks.py [NOTEBOOK ...]

It needs nbclient and ipykernel, which the extra "test" brings. `tests/test_notebooks.py` executes them too.
"""
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / 'notebooks'


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """Return a notebook with the outputs of a new kernel, and without anything of the machine that executed it.

    What goes to stderr is left out: progress bars, and warnings with their paths.

    Args:
        path: The notebook. It is only read.
        folder: Where the kernel runs.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised. The message has the cell and the traceback.
        nbclient.exceptions.CellTimeoutError: A cell took more than ten minutes.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, kernel_name='python3', record_timing=False,
                            coalesce_streams=True, resources={'metadata': {'path': str(folder)}})
    client.execute()
    notebook.metadata = nbformat.from_dict({
        'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
        'language_info': {'name': 'python'}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == 'code':
            cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
    return notebook


if __name__ == '__main__':
    for path in map(Path, sys.argv[1:] or sorted(map(str, FOLDER.glob('*.ipynb')))):
        nbformat.write(execute(path, path.parent), path)
        print(f'wrote {path.name}')
