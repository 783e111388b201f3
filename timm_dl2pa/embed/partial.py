"""The part of a run that is done: embeddings on the disk, batch by batch, so that an interrupted run goes on."""
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ['PartialEmbeddings']

_FACTS, _ROWS, _ENTRIES = 'run.json', 'embeddings.f32', 'images.txt'


class PartialEmbeddings:
    """The embeddings (N, d) float32 of a run, as far as they are made, in a folder beside the file to come.

    Whole batches count: the same batches are made again after an interruption, so that the numbers are the same.

    Args:
        out: The file to come. The folder is named after it, with `.part`.
        facts: What the run depends on, as JSON values. A part with other facts is not continued.
        entries: N lines of text, one for each image. A part of other images is not continued; those that are still to
            come may have changed.
        dim: d.
        batch_size: B.

    Raises:
        ValueError: There is a part of another run. The first difference is named.
        OSError: The folder cannot be made or read.
    """

    def __init__(self, out: Path, facts: dict[str, Any], entries: list[str], dim: int, batch_size: int):
        self.folder = out.with_name(f'{out.name}.part')
        self.entries, self.dim = entries, dim
        self.path = self.folder / _ROWS
        facts = json.loads(json.dumps({**facts, 'batch_size': batch_size}))
        if (self.folder / _FACTS).exists():
            self._check_facts(facts)
        else:
            self.discard(out)
            self.folder.mkdir(parents=True)
            part = self.folder / f'{_FACTS}.new'
            part.write_text(json.dumps(facts))
            part.replace(self.folder / _FACTS)
        # Opened for appending, which makes them where they are missing.
        self._rows, self._lines = (path.open('ab') for path in (self.path, self.folder / _ENTRIES))
        try:
            self.done = self._count_done(batch_size)
        except BaseException:
            self.close()
            raise

    def _check_facts(self, facts: dict[str, Any]) -> None:
        try:
            there = json.loads((self.folder / _FACTS).read_bytes())
        except ValueError:
            there = {}
        for name, value in facts.items():
            if not isinstance(there, dict) or there.get(name) != value:
                raise self._of_another_run(f'{name} differs')

    def _of_another_run(self, difference: str) -> ValueError:
        return ValueError(f'{self.folder} is part of another run: {difference}. Give --restart to begin anew, or '
                          f'another --out.')

    def _count_done(self, batch_size: int) -> int:
        """Return how many images are done, and cut off what was being written when the run ended."""
        lines = (self.folder / _ENTRIES).read_bytes().split(b'\n')[:-1]
        done = min(len(lines), self.path.stat().st_size // (4 * self.dim))
        done -= 0 if done == len(self.entries) else done % batch_size
        own = [entry.encode() for entry in self.entries[:done]]
        if own != lines[:done]:
            first = next((index for index, (one, other) in enumerate(zip(own, lines)) if one != other), len(own))
            raise self._of_another_run(f'image {first + 1} was {lines[first].decode()}')
        self._rows.truncate(4 * self.dim * done)
        self._lines.truncate(sum(len(line) + 1 for line in lines[:done]))
        return done

    @property
    def count(self) -> int:
        """N."""
        return len(self.entries)

    def add(self, embeddings: torch.Tensor) -> None:
        """Append the embeddings (B, d) of the next images."""
        self._rows.write(embeddings.contiguous().numpy().astype('<f4', copy=False).tobytes())
        self._rows.flush()
        entries = self.entries[self.done:self.done + len(embeddings)]
        self._lines.write(''.join(f'{entry}\n' for entry in entries).encode())
        self._lines.flush()
        self.done += len(embeddings)

    def embeddings(self) -> torch.Tensor:
        """Return all embeddings (N, d), read from the disk as they are needed."""
        return torch.from_numpy(np.memmap(self.path, '<f4', 'r+', shape=(self.count, self.dim)))

    def close(self) -> None:
        """Close the files. What is done stays."""
        self._rows.close()
        self._lines.close()

    def remove(self) -> None:
        """Remove the folder: the run is over."""
        self.close()
        shutil.rmtree(self.folder)

    @staticmethod
    def discard(out: Path) -> None:
        """Remove what an earlier run left for a file to come, if anything."""
        shutil.rmtree(out.with_name(f'{out.name}.part'), ignore_errors=True)
