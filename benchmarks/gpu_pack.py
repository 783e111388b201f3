"""Results and checkpoints of a GPU run in a few files, for machines from which only a few can be taken.

`results.tar` has the records and the logs. `checkpoints-0.tar`, `checkpoints-1.tar`, ... have the checkpoints of
trainings that are under way, each of these files below a size.
"""
import os
import tarfile
from pathlib import Path

__all__ = ['pack', 'unpack']

# Bytes that one file may have, and how many files there may be.
LARGEST = 15 * 2 ** 20
MOST_FILES = 6


def pack(folder: Path, into: Path, largest: int = LARGEST, most: int = MOST_FILES) -> list[str]:
    """Write the tar files of a run's folder, each at once, and return the checkpoints that found no room.

    Args:
        folder: Holds *.json, logs/*.log and, in its folders, *.json and *.ckpt.
        into: Where the tar files go.
        largest: Bytes that one tar file may have.
        most: How many there may be in all. The checkpoints that were written last come first.
    """
    into.mkdir(parents=True, exist_ok=True)
    records = sorted([*folder.glob('*.json'), *folder.glob('*/*.json'), *folder.glob('logs/*.log')])
    _write(into / 'results.tar', records, folder)
    volumes: list[tuple[int, list[Path]]] = []
    left_out = []
    checkpoints = sorted(folder.glob('*/*.ckpt'), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in checkpoints:
        size = file.stat().st_size + 2 ** 12
        place = next((number for number, (used, _) in enumerate(volumes) if used + size <= largest), None)
        if place is None and len(volumes) + 1 < most and size <= largest:
            place = len(volumes)
            volumes.append((2 ** 14, []))
        if place is None:
            left_out.append(file.name)
            continue
        used, files = volumes[place]
        volumes[place] = used + size, [*files, file]
    for number, (_, files) in enumerate(volumes):
        _write(into / f'checkpoints-{number}.tar', files, folder)
    for stale in into.glob('checkpoints-*.tar'):
        if int(stale.stem.partition('-')[2]) >= len(volumes):
            stale.unlink()
    return left_out


def _write(path: Path, files: list[Path], folder: Path) -> None:
    part = path.with_suffix('.part')
    with tarfile.open(part, 'w') as tar:
        for file in files:
            tar.add(file, str(file.relative_to(folder)))
    os.replace(part, path)


def unpack(files: list[Path], results: Path, checkpoints: Path) -> list[Path]:
    """Take records into one folder and checkpoints into another, and return what was written. Logs stay packed.

    A record replaces the one that is there; a checkpoint does too, but where there is a record of its run.

    Args:
        files: Tar files that `pack` wrote.
        results: Where records go, `benchmarks/results`.
        checkpoints: Where checkpoints go: the folder that the next run is given as --output.

    Raises:
        ValueError: A file holds something else.
    """
    written = []
    for file in files:
        with tarfile.open(file) as tar:
            for member in tar.getmembers():
                name = Path(member.name)
                if name.is_absolute() or '..' in name.parts or len(name.parts) > 2 or not member.isfile() or \
                        name.suffix not in ('.json', '.ckpt', '.log'):
                    raise ValueError(f'{file} is not of this benchmark: it holds {member.name!r}.')
                if name.suffix == '.log':
                    continue
                target = (results if name.suffix == '.json' else checkpoints) / name
                if name.suffix == '.ckpt' and (results / name).with_suffix('.json').exists():
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_suffix('.part')
                part.write_bytes(tar.extractfile(member).read())
                os.replace(part, target)
                written.append(target)
    return written
