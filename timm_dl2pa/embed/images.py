"""The images of a folder, however it is nested, with the folders as labels."""
import json
import os
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import is_image_file

__all__ = ['ImageList', 'list_images']


@dataclass(frozen=True)
class ImageList:
    """The images of a folder in the order of their names.

    Attributes:
        root: The folder.
        names: The paths of the N images below it, with slashes.
        labels: The index of each image's own folder in `label_names`; -1 for those that lie in the root.
        label_names: The sorted paths of the folders that hold images.
    """
    root: Path
    names: list[str]
    labels: list[int]
    label_names: list[str]

    @property
    def files(self) -> list[tuple[str, int]]:
        """The path and the label of each image."""
        return [(str(self.root / name), label) for name, label in zip(self.names, self.labels)]

    def entries(self) -> list[str]:
        """Return a line of text for each image, its name and size, by which a changed list is seen."""
        return [json.dumps([name, (self.root / name).stat().st_size]) for name in self.names]


def list_images(folder: str | os.PathLike[str]) -> ImageList:
    """Find the images of a folder and of all folders in it, except hidden ones. None is opened.

    Raises:
        FileNotFoundError: The folder does not exist, or there are no images in it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f'{root}: no such folder.')
    names = []
    for parent, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.') and not _leads_back(Path(parent) / name)]
        names += [(Path(parent) / name).relative_to(root).as_posix() for name in files
                  if is_image_file(name) and not name.startswith('.')]
    if not names:
        raise FileNotFoundError(f'{root} has no images in it (.jpg, .png, .webp, ...).')
    names.sort()
    parents = [name.rpartition('/')[0] for name in names]
    label_names = sorted({parent for parent in parents if parent})
    index = {name: number for number, name in enumerate(label_names)}
    return ImageList(root, names, [index.get(parent, -1) for parent in parents], label_names)


def _leads_back(folder: Path) -> bool:
    """Return whether a folder is a link to one that it lies in, which would never end."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())
