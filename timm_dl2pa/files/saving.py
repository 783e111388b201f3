"""SavedModule: a module by itself in a folder or a Hub repository, its tensors as safetensors, its config as JSON."""
import hashlib
import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from safetensors.torch import save

from ..version import __version__
from .card import Facts, Training, card_files
from .folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_finite,
    check_format,
    check_label_names,
    find_files,
    read_config,
    read_tensors,
    replace_files,
)
from .upload import upload

__all__ = ['LIBRARY', 'SavedModule']

LIBRARY = 'timm_dl2pa'
_FORMAT = 1


class SavedModule:
    """Mixed into a module that is rebuilt from its `config` and its state dict alone.

    A subclass names the class of its config, a frozen dataclass with `from_json` and `tensor_shapes`, and says how it
    is made from config and tensors (`from_tensors`), how for other classes (`with_classes`), and what of it cannot be
    saved alone (`check_saved_alone`).

    Class attributes:
        config_class: Class of `config`.
        whole_numbers: Names of the tensors that are not floating point.
    """
    config_class: ClassVar[type]
    whole_numbers: ClassVar[tuple[str, ...]] = ()
    label_names: list[str] | None

    def save_pretrained(self, folder: str | os.PathLike, *, label_names: list[str] | None = None) -> Path:
        """Write the head to a folder, from which `load_head` makes it again.

        All files are complete before the first takes the place of an older one; if that fails, the older ones come
        back. The config names the weights' sha256.

        Args:
            folder: Made if missing.
            label_names: C names of the classes. Default: the head's, if any.

        Returns:
            The folder.

        Raises:
            ValueError: There are not C label names, a tensor is not finite, or layers of the backbone's own classifier
                stand before the head's neck: they belong to the model. Nothing was written.
        """
        contents = self.file_contents(label_names)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix='.part-', dir=folder) as stage:
            for name, content in contents.items():
                (Path(stage) / name).write_bytes(content)
            replace_files({folder / name: Path(stage) / name for name in contents})
        return folder

    def file_contents(self, label_names: list[str] | None = None) -> dict[str, bytes]:
        """Return the contents of the two files that hold the head, by their names. Raises what `save_pretrained` does.
        """
        self.check_saved_alone()
        label_names = self.label_names if label_names is None else list(label_names)
        check_label_names(label_names, self.config.num_classes, 'label_names')
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        check_finite(tensors, 'the head')
        weights = save(tensors, metadata={'format': 'pt'})
        config = {
            'library_name': LIBRARY,
            'format': _FORMAT,
            'head': asdict(self.config),
            'label_names': label_names,
            'weights_sha256': hashlib.sha256(weights).hexdigest(),
            'versions': {LIBRARY: __version__, 'torch': str(torch.__version__)},
        }
        return {WEIGHTS_NAME: weights, CONFIG_NAME: (json.dumps(config, indent=2) + '\n').encode()}

    @classmethod
    def from_pretrained(
            cls,
            source: str | os.PathLike,
            *,
            num_classes: int | None = None,
            revision: str | None = None,
            token: str | bool | None = None,
            cache_dir: str | os.PathLike | None = None,
            force_download: bool = False,
            local_files_only: bool = False,
    ) -> Any:
        """Make the head that a folder or a repository of the Hugging Face Hub holds, in evaluation mode.

        No prototypes are computed: they are in the file. Nothing is unpickled. Everything is checked before a head is
        made.

        Args:
            source: A folder, or the name of a repository ('me/head', also 'hf-hub:me/head@revision' and
                'local-dir:folder' as timm writes them).
            num_classes: C. Default: that of the head. With another number the neck is kept and the assignment is new,
                on new prototypes; a warning says so.
            revision: Branch, tag or commit of the repository.
            token: See huggingface_hub, as `cache_dir`, `force_download` and `local_files_only`.
            cache_dir: Where downloads are kept.
            force_download: Download also what is kept.
            local_files_only: Take what is kept, without a connection.

        Returns:
            The head, with `label_names` (a list of C names, or None).

        Raises:
            FileNotFoundError: There is no such folder, or a file is missing in it.
            ValueError: There are no weights in safetensors, a file is damaged or of a newer format, or the values in it
                are no head's.
            huggingface_hub.errors.HfHubHTTPError: What huggingface_hub raises.

        Example:
            >>> _ = head.save_pretrained('my-head')
            >>> load_head('my-head').num_classes == head.num_classes
            True
        """
        folder, origin = find_files(source, 'a DL2PA head', revision=revision, token=token, cache_dir=cache_dir,
                                    force_download=force_download, local_files_only=local_files_only)
        config, label_names, digest = cls._read_config(folder, origin)
        tensors = read_tensors(folder / WEIGHTS_NAME, origin, config.tensor_shapes(), cls.whole_numbers, digest)
        try:
            head = cls.from_tensors(config, tensors)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f'{origin}: {error}') from None
        head.label_names = label_names
        if num_classes not in (None, config.num_classes):
            warnings.warn(f'{origin} is a head of {config.num_classes} classes, not {num_classes}: its neck is kept, '
                          f'prototypes and assignment are new.', stacklevel=2)
            head = head.with_classes(num_classes)
        return head.eval()

    @classmethod
    def _read_config(cls, folder: Path, origin: str) -> tuple[Any, list[str] | None, str]:
        """Return the head's config, the label names, and the sha256 of the weights."""
        config = read_config(folder, origin)
        if config.get('library_name') != LIBRARY or not isinstance(config.get('head'), dict):
            raise ValueError(f'{origin}: {CONFIG_NAME} is not that of a DL2PA head. (A whole model: load it with '
                             f"timm.create_model('hf-hub:...') or load_model.)")
        check_format(config.get('format'), _FORMAT, origin)
        head = cls.config_class.from_json(config['head'], f'{origin}: {CONFIG_NAME}')
        labels, digest = config.get('label_names'), config.get('weights_sha256')
        check_label_names(labels, head.num_classes, f'{origin}: label_names in {CONFIG_NAME}')
        if not isinstance(digest, str):
            raise ValueError(f'{origin}: {CONFIG_NAME} names no weights_sha256.')
        return head, labels, digest

    def push_to_hub(
            self,
            repo_id: str,
            *,
            label_names: list[str] | None = None,
            base_model: str | None = None,
            metrics: dict[str, float] | None = None,
            license: str | None = None,
            class_means: torch.Tensor | None = None,
            training: Training | None = None,
            backbone: str | None = None,
            backbone_license: str | None = None,
            commit_message: str = 'Upload a DL2PA head',
            **upload_options: Any,
    ) -> str:
        """Upload the head alone to a repository of the Hugging Face Hub, and return the address of the commit.

        See `timm_dl2pa.push_head_to_hub`, which finds out more of the model around the head.

        Args:
            repo_id: 'me/name'.
            label_names: C names of the classes. Default: the head's, if any.
            base_model: For the card, the backbone's repository, if the backbone was not trained further.
            metrics: For the card: 'accuracy' and the like, as fractions.
            license: For the card.
            class_means: (C, d), for the card.
            training: For the card.
            backbone: For the card, the name of the timm model.
            backbone_license: For the card, of the backbone's weights.
            commit_message: Its first line.
            upload_options: `private`, `token`, `revision` and `create_pr` of huggingface_hub.

        Raises:
            ValueError: What `save_pretrained` raises. Nothing was sent.
            RuntimeError: The upload failed in a repository that was just made, which is left empty.
            huggingface_hub.errors.HfHubHTTPError: What huggingface_hub raises otherwise. The repository is as it was.
        """
        label_names = self.label_names if label_names is None else label_names
        contents = self.file_contents(label_names)
        facts = Facts(backbone=backbone, label_names=label_names, base_model=base_model, metrics=metrics,
                      license=license, backbone_license=backbone_license, class_means=class_means, training=training)
        contents.update(card_files(self, repo_id, facts, kind='head'))
        return upload(contents, repo_id, commit_message=commit_message, **upload_options)
