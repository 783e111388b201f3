"""SavedModule: saves a module to a folder or a Hub repository, as safetensors with a JSON config."""
import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from ..prototypes.files import staging_folder, write_tensors
from ..version import __version__
from .card import Facts, Training, card_files
from .folder import CONFIG_NAME, WEIGHTS_NAME, check_format, new_folder, read_config, replace_files
from .labels import LabelNames, read_label_names
from .source import find_files
from .tensors import check_finite, read_tensors, sha256_of
from .upload import upload

__all__ = ['LIBRARY', 'SavedModule']

LIBRARY = 'timm_dl2pa'
_FORMAT = 1

Saved = TypeVar('Saved', bound='SavedModule')


class SavedModule:
    """Mixin that saves, loads and uploads a module which its `config` and state dict fully describe.

    A subclass defines the class of its config, a frozen dataclass with `from_json` and `tensor_shapes`, and three
    methods: `from_tensors` makes the module from config and tensors, `with_classes` makes it for another number of
    classes, and `check_saved_alone` raises a ValueError if the module cannot be saved without its model.

    Attributes:
        config_class: The class of `config`.
        whole_numbers: The names of the tensors that are not of a floating-point dtype.
        label_names: The names of the C classes, or None.
    """
    config_class: ClassVar[type]
    whole_numbers: ClassVar[tuple[str, ...]] = ()
    label_names: list[str] | None

    def save_pretrained(self, folder: str | os.PathLike[str], *, label_names: LabelNames | None = None) -> Path:
        """Save the head to a folder, from which `load_head` loads it.

        The files are `model.safetensors` and `config.json`, which holds the sha256 of the weights. Both are complete,
        and the head was loaded from them, before they replace older files. If that fails, the older files are restored.

        Args:
            folder: The folder, which is created if necessary.
            label_names: The names of the C classes: a list by index, or a mapping such as `id2label` or `class_to_idx`.
                Default: the head's, if any.

        Returns:
            The folder.

        Raises:
            ValueError: The label names are not C names, a tensor is not finite, the head could not be loaded again, or
                layers of the backbone's original classifier precede the head's neck and belong to the model. The folder
                is unchanged.
            OSError: A file cannot be written. The folder is unchanged.

        Example:
            >>> folder = head.save_pretrained('my-head', label_names=list('0123456789'))
            >>> load_head(folder).label_names[:3]
            ['0', '1', '2']
        """
        self.check_saved_alone()
        label_names = self._label_names(label_names)
        with new_folder(folder) as folder, self._stage(label_names, parent=folder) as stage:
            replace_files({folder / part.name: part for part in sorted(stage.iterdir())})
        return folder

    @contextmanager
    def _stage(self, label_names: list[str] | None, parent: Path | None = None) -> Iterator[Path]:
        """Context manager that writes the two files to a temporary folder, after checking that they can be loaded.

        Args:
            label_names: The names of the C classes, checked.
            parent: The folder in which the temporary folder is made. Default: the system's.

        Yields:
            The temporary folder, which is removed on leaving the context.

        Raises:
            ValueError: A tensor is not finite, or the files do not make the same head.
            OSError: A file cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()}
        check_finite(tensors, 'the head')
        with staging_folder(parent) as stage:
            write_tensors(stage / WEIGHTS_NAME, tensors, {'format': 'pt'})
            config = {
                'library_name': LIBRARY,
                'format': _FORMAT,
                'head': asdict(self.config),
                'label_names': label_names,
                'weights_sha256': sha256_of(stage / WEIGHTS_NAME),
                'versions': {LIBRARY: __version__, 'torch': str(torch.__version__)},
            }
            (stage / CONFIG_NAME).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
            self._check_reloaded(tensors, stage)
            yield stage

    def _check_reloaded(self, tensors: dict[str, torch.Tensor], stage: Path) -> None:
        """Raise a ValueError unless the files make the same head."""
        try:
            reloaded = self.from_pretrained(f'local-dir:{stage}').state_dict()
        except ValueError as error:
            reason = str(error).removeprefix(f'{stage}: ')
            raise ValueError(f'the head cannot be saved, because it could not be loaded again: {reason}') from None
        for name, tensor in tensors.items():
            again = reloaded[name].to(tensor.dtype)
            # Prototypes in bfloat16 are of unit length again when they have been loaded.
            if not (torch.equal(tensor, again) or (tensor.is_floating_point()
                                                   and torch.allclose(tensor, again, rtol=0, atol=4e-3))):
                raise ValueError(f'the head cannot be saved, because another one would be loaded: {name} differs.')

    def _label_names(self, given: LabelNames | None) -> list[str] | None:
        """Return the given names of the classes, or those of the head."""
        return read_label_names(self.label_names if given is None else given, self.config.num_classes)

    @classmethod
    def from_pretrained(
            cls: type[Saved],
            source: str | os.PathLike[str],
            *,
            num_classes: int | None = None,
            revision: str | None = None,
            token: str | bool | None = None,
            cache_dir: str | os.PathLike[str] | None = None,
            force_download: bool = False,
            local_files_only: bool = False,
    ) -> Saved:
        """Load a head from a folder or a repository of the Hugging Face Hub, in evaluation mode.

        The prototypes are read from the file, not computed. Nothing is unpickled. All contents are checked before the
        head is made.

        Args:
            source: A folder or a Hub repository ('user/head'; also 'hf-hub:user/head@revision' and 'local-dir:folder',
                timm's notation).
            num_classes: C. Default: that of the saved head. For another number the neck is kept, and prototypes and
                assignment are new; a warning is issued.
            revision: The branch, tag or commit of the repository.
            token: The token for huggingface_hub. Default: the stored one.
            cache_dir: The folder of downloads. Default: huggingface_hub's cache.
            force_download: Whether to download files that are in the cache already.
            local_files_only: Whether to use the cache alone, without a connection.

        Returns:
            The head, with `label_names` (a list of C names, or None).

        Raises:
            FileNotFoundError: The folder does not exist, or it lacks one of the files.
            ValueError: The repository has no weights in safetensors, a file is damaged or of a newer format, or its
                values do not make a head.
            huggingface_hub.errors.HfHubHTTPError: The Hub cannot be reached, or refuses the request.

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
            warnings.warn(f'{origin} is a head for {config.num_classes} classes, not {num_classes}: its neck is kept, '
                          f'its prototypes and assignment are new.', stacklevel=2)
            head = head.with_classes(num_classes)
        return head.eval()

    @classmethod
    def _read_config(cls, folder: Path, origin: str) -> tuple[Any, list[str] | None, str]:
        """Return the head's config, the label names, and the sha256 of the weights."""
        config = read_config(folder, origin)
        if config.get('library_name') != LIBRARY or not isinstance(config.get('head'), dict):
            raise ValueError(f'{origin}: {CONFIG_NAME} is not that of a DL2PA head. Load a whole model with load_model '
                             f"or timm.create_model('hf-hub:...').")
        check_format(config.get('format'), _FORMAT, origin)
        head = cls.config_class.from_json(config['head'], f'{origin}: {CONFIG_NAME}')
        digest = config.get('weights_sha256')
        labels = read_label_names(config.get('label_names'), head.num_classes,
                                  f'{origin}: label_names in {CONFIG_NAME}')
        if not isinstance(digest, str):
            raise ValueError(f'{origin}: {CONFIG_NAME} must state weights_sha256, a string, not {digest!r}.')
        return head, labels, digest

    def push_to_hub(
            self,
            repo_id: str,
            *,
            label_names: LabelNames | None = None,
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
        """Upload the head alone to a repository of the Hugging Face Hub, with a model card.

        `timm_dl2pa.push_head_to_hub` takes a whole model and adds what timm knows of its backbone to the card.

        Args:
            repo_id: The repository, 'user/name'.
            label_names: The names of the C classes: a list by index, or a mapping such as `id2label` or `class_to_idx`.
                Default: the head's, if any.
            base_model: For the card: the repository of the backbone, if the backbone was not fine-tuned.
            metrics: For the card: metrics such as 'accuracy', as fractions.
            license: For the card: the licence of the repository.
            class_means: For the card: (C, d), the mean directions of the classes' embeddings.
            training: For the card: the record of the training.
            backbone: For the card: the name of the timm model.
            backbone_license: For the card: the licence of the backbone's pretrained weights.
            commit_message: The first line of the commit message.
            upload_options: `private`, `token`, `revision` and `create_pr` of huggingface_hub.

        Returns:
            The URL of the commit, or of the pull request.

        Raises:
            ValueError: See `save_pretrained`. Nothing was sent.
            RuntimeError: The upload to a new repository failed. The repository exists and is empty.
            huggingface_hub.errors.HfHubHTTPError: Any other error of huggingface_hub. The repository is unchanged.

        Example:
            >>> address = head.push_to_hub('me/my-head', metrics={'accuracy': 0.81})
        """
        self.check_saved_alone()
        label_names = self._label_names(label_names)
        facts = Facts(backbone=backbone, label_names=label_names, base_model=base_model, metrics=metrics,
                      license=license, backbone_license=backbone_license, class_means=class_means, training=training)
        card = card_files(self, repo_id, facts, kind='head')
        with self._stage(label_names) as stage:
            contents = {**{path.name: path for path in stage.iterdir()}, **card}
            return upload(contents, repo_id, commit_message=commit_message, **upload_options)
