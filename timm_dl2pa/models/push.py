"""Upload heads and whole models to the Hugging Face Hub, in one commit each."""
from typing import Any

import torch
import torch.nn as nn

from ..files.card import Facts, Training, card_files
from ..files.labels import LabelNames
from ..files.upload import upload
from ..head import heads_of
from .folding import fold_dl2pa
from .model_stage import model_stage
from .saved import check_savable, label_names_of
from .wrapping import backbone_name

__all__ = ['push_head_to_hub', 'push_model_to_hub']


def push_head_to_hub(
        model_or_head: nn.Module,
        repo_id: str,
        *,
        label_names: LabelNames | None = None,
        base_model: str | None = None,
        metrics: dict[str, float] | None = None,
        license: str | None = None,
        class_means: torch.Tensor | None = None,
        training: Training | None = None,
        commit_message: str = 'Upload a DL2PA head',
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
) -> str:
    """Upload a head alone, a few kilobytes to megabytes, to a repository of the Hugging Face Hub.

    The repository is created if necessary, and all files are in one commit. If the repository has no model card yet,
    one is added, with a picture if matplotlib is installed. `load_head(repo_id)` and `wrap_dl2pa(backbone,
    head=repo_id)` load the head.

    Args:
        model_or_head: A head, or a wrapped model, of which the main head is uploaded.
        repo_id: The repository, 'user/name'.
        label_names: The names of the C classes: a list by index, or a mapping such as `id2label` or `class_to_idx`.
            Default: those that the model or head was loaded with, if any.
        base_model: For the card: the repository of the backbone, such as 'timm/resnet50.a1_in1k', if the backbone was
            not fine-tuned.
        metrics: For the card: metrics such as 'accuracy', as fractions.
        license: For the card: the licence of the repository, such as 'apache-2.0'.
        class_means: For the card: (C, d), the mean directions of the classes' embeddings,
            `scheduler.class_means.directions()`.
        training: For the card: the record of the training, a `timm_dl2pa.files.card.Training`.
        commit_message: The first line of the commit message.
        private: Whether a new repository is private. Default: the user's setting on the Hub.
        token: A token with write access. Default: the one stored by `hf auth login`.
        revision: The branch. Default: main.
        create_pr: Whether to open a pull request instead of committing to the branch.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        ValueError: The model has no head, a tensor is not finite, layers of the backbone's original classifier precede
            the head's neck, or the number of names is not C. Nothing was sent.
        RuntimeError: The upload to a new repository failed. The repository exists and is empty.
        huggingface_hub.errors.HfHubHTTPError: Any other error of huggingface_hub. The repository is unchanged.

    Example:
        >>> address = push_head_to_hub(model, 'me/my-head', metrics={'accuracy': 0.81}, license='mit')
        >>> load_head('me/my-head').num_classes
        100
    """
    heads = heads_of(model_or_head)
    if not heads:
        raise ValueError(f'{type(model_or_head).__name__} has no DL2PAHead: wrap it with wrap_dl2pa first.')
    head = heads[0]
    if label_names is None:
        label_names = getattr(model_or_head, 'label_names', None)
    return head.push_to_hub(
        repo_id, label_names=label_names, base_model=base_model, metrics=metrics, license=license,
        class_means=class_means, training=training, backbone=backbone_name(model_or_head),
        backbone_license=_license_of(model_or_head), commit_message=commit_message, private=private, token=token,
        revision=revision, create_pr=create_pr)


def push_model_to_hub(
        model: nn.Module,
        repo_id: str,
        *,
        folded: bool = False,
        model_args: dict[str, Any] | None = None,
        data_config: dict[str, Any] | None = None,
        label_names: LabelNames | None = None,
        base_model: str | None = None,
        metrics: dict[str, float] | None = None,
        license: str | None = None,
        class_means: torch.Tensor | None = None,
        training: Training | None = None,
        commit_message: str = 'Upload a DL2PA model',
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
) -> str:
    """Upload a whole wrapped model to a repository of the Hugging Face Hub, in timm's format with safetensors weights.

    With timm_dl2pa imported, `timm.create_model('hf-hub:user/name', pretrained=True)` loads the model. Before anything
    is sent, the model is made from the files and every tensor is compared. If the repository has no model card yet, one
    is added, with a picture if matplotlib is installed.

    Args:
        model: A wrapped timm model. It is not changed.
        repo_id: The repository, 'user/name'.
        folded: Whether to upload the plain timm model of `fold_dl2pa`, which needs timm alone.
        model_args: The arguments of `timm.create_model` for the backbone, such as `img_size`. timm records them since
            1.0.31; earlier versions need them here.
        data_config: The preparation of images ('input_size', 'mean', ...). Default: the model's.
        label_names: The names of the C classes: a list by index, or a mapping such as `id2label` or `class_to_idx`.
            Default: those that the model was loaded with, if any.
        base_model: For the card: the repository of the model that was fine-tuned.
        metrics: For the card: metrics such as 'accuracy', as fractions.
        license: For the card: the licence of the repository, '' for none. Default: that of the backbone's pretrained
            weights, if timm states it.
        class_means: For the card: (C, d), the mean directions of the classes' embeddings,
            `scheduler.class_means.directions()`.
        training: For the card: the record of the training, a `timm_dl2pa.files.card.Training`.
        commit_message: The first line of the commit message.
        private: Whether a new repository is private. Default: the user's setting on the Hub.
        token: A token with write access. Default: the one stored by `hf auth login`.
        revision: The branch. Default: main.
        create_pr: Whether to open a pull request instead of committing to the branch.

    Returns:
        The URL of the commit, or of the pull request.

    Raises:
        ValueError: The model has no head, a tensor is not finite, the number of names is not C, or the files make
            another model (the difference is named). Nothing was sent.
        RuntimeError: The upload to a new repository failed. The repository exists and is empty.
        huggingface_hub.errors.HfHubHTTPError: Any other error of huggingface_hub. The repository is unchanged.

    Example:
        >>> address = push_model_to_hub(model, 'me/my-model', metrics={'accuracy': 0.81})
        >>> timm.create_model('hf-hub:me/my-model', pretrained=True).num_classes
        100
    """
    check_savable(model)
    label_names = label_names_of(model, label_names)
    uploaded = fold_dl2pa(model) if folded else model
    facts = Facts(
        backbone=backbone_name(model), label_names=label_names, base_model=base_model, metrics=metrics,
        license=license, backbone_license=_license_of(model), class_means=class_means, training=training)
    card = card_files(heads_of(model)[0], repo_id, facts, kind='folded' if folded else 'model')
    with model_stage(uploaded, model_args=model_args, data_config=data_config, label_names=label_names) as stage:
        contents = {**{path.name: path for path in stage.iterdir()}, **card}
        return upload(contents, repo_id, commit_message=commit_message, private=private, token=token, revision=revision,
                      create_pr=create_pr)


def _license_of(model: nn.Module) -> str | None:
    """Return the licence of a backbone's pretrained weights, if timm states it."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('license')
