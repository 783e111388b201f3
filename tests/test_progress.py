"""Progress bars are quiet where the output is no terminal: logs and pipes get no carriage returns."""
import ast
import io
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from timm_dl2pa import DL2PAHead, make_prototypes, prime

ROOT = Path(__file__).parent.parent
FILES = [str(path.relative_to(ROOT)) for folder in ('timm_dl2pa', 'benchmarks')
         for path in sorted((ROOT / folder).rglob('*.py')) if 'tqdm' in path.read_text()]


def loud_bars(code: str) -> list[int]:
    """The lines of the bars that are made without `disable`."""
    return [node.lineno for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ('tqdm', 'trange')
            and 'disable' not in (keyword.arg for keyword in node.keywords)]


@pytest.mark.parametrize('file', FILES)
def test_every_bar_asks_whether_there_is_a_terminal(file):
    assert not loud_bars((ROOT / file).read_text())


def test_loud_bars_are_found():
    assert loud_bars("for x in tqdm(y):\n    pass\nbar = tqdm(total=3, disable=None)") == [1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize('stream, shown', [(io.StringIO, False), (Terminal, True)])
def test_bars_are_shown_on_terminals_alone(stream, shown, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', stream())
    make_prototypes(7, 3, method='optimise', effort=0.01, progress=True, cache=False)
    assert ('prototypes' in sys.stderr.getvalue()) == shown
    monkeypatch.setattr(sys, 'stderr', stream())
    model = nn.Sequential(DL2PAHead(6, 4, 3, recipe='paper'))
    prime(model, [(torch.randn(8, 6), torch.arange(8) % 4)] * 3)
    assert ('prime' in sys.stderr.getvalue()) == shown
