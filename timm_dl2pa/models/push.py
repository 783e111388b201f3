"""Heads and models on the Hugging Face Hub: one commit with all files, or none."""
from typing import Any

import torch
import torch.nn as nn

from ..files.card import Facts, Training, card_files
from ..files.folder import check_label_names
from ..files.upload import upload
from ..head import heads_of
from .folding import fold_dl2pa
from .model_files import model_stage
from .saved import check_savable
from .wrapping import backbone_name

__all__ = ['push_head_to_hub', 'push_model_to_hub']


def push_head_to_hub(
        model_or_head: nn.Module,
        repo_id: str,
        *,
        label_names: list[str] | None = None,
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

    The repository is made if there is none. All files come in one commit. A model card, with a picture where matplotlib
    is at hand, is added where the repository has none yet. `load_head(repo_id)` and
    `wrap_dl2pa(backbone, head=repo_id)` bring the head back.

    Args:
        model_or_head: A wrapped model, whose main head is taken, or a head.
        repo_id: 'me/name'.
        label_names: C names of the classes. Default: those that the head was loaded with, if any.
        base_model: For the card, the backbone's repository, if the backbone was not trained further:
            'timm/resnet50.a1_in1k', say.
        metrics: For the card: 'accuracy' and the like, as fractions.
        license: For the card: 'apache-2.0', say.
        class_means: (C, d), for the card: `scheduler.class_means.directions()`.
        training: For the card, see `timm_dl2pa.card.Training`.
        commit_message: Its first line.
        private: Whether a new repository is private. See huggingface_hub, as `token`, `revision` and `create_pr`.
        token: A token with write access. Default: the one that `hf auth login` keeps.
        revision: The branch. Default: main.
        create_pr: Open a pull request rather than commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: There is no head, it is not finite, or the number of names is not C. Nothing was sent.
        RuntimeError: The upload failed in a repository that was just made, which is left empty.
        huggingface_hub.errors.HfHubHTTPError: What huggingface_hub raises otherwise. The repository is as it was.
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
        label_names: list[str] | None = None,
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
    """Upload backbone and head to a repository of the Hugging Face Hub, in timm's format and safetensors alone.

    With timm_dl2pa imported, `timm.create_model('hf-hub:me/name', pretrained=True)` gives the same logits. Before
    anything is sent, the model is made again from the files, and every tensor compared. A model card, with a picture
    where matplotlib is at hand, is added where the repository has none yet.

    Args:
        model: A wrapped timm model. It stays as it is.
        repo_id: 'me/name'.
        folded: Upload the plain timm model of `fold_dl2pa`, which needs timm alone.
        model_args: The arguments that `timm.create_model` made the backbone with (`img_size`, say). timm records them
            from 1.0.31 on; earlier versions need them here.
        data_config: How images are prepared ('input_size', 'mean', ...). Default: the model's.
        label_names: C names of the classes. Default: those that the model was loaded with, if any.
        base_model: For the card: what the model was trained from.
        metrics: For the card: 'accuracy' and the like, as fractions.
        license: For the card. Default: that of the backbone's weights, where timm says it; '' for none.
        class_means: (C, d), for the card: `scheduler.class_means.directions()`.
        training: For the card, see `timm_dl2pa.card.Training`.
        commit_message: Its first line.
        private: See `push_head_to_hub`, as `token`, `revision` and `create_pr`.
        token: A token with write access.
        revision: The branch.
        create_pr: Open a pull request rather than commit.

    Returns:
        The address of the commit, or of the pull request.

    Raises:
        ValueError: There is no head, a tensor is not finite, the number of names is not C, or the files do not make the
            model again. Nothing was sent.
        RuntimeError: The upload failed in a repository that was just made, which is left empty.
        huggingface_hub.errors.HfHubHTTPError: What huggingface_hub raises otherwise. The repository is as it was.
    """
    check_savable(model)
    label_names = label_names or getattr(model, 'label_names', None)
    check_label_names(label_names, model.num_classes, 'label_names')
    sent = fold_dl2pa(model) if folded else model
    facts = Facts(
        backbone=backbone_name(model), label_names=label_names, base_model=base_model, metrics=metrics,
        license=license, backbone_license=_license_of(model), class_means=class_means, training=training)
    card = card_files(heads_of(model)[0], repo_id, facts, kind='folded' if folded else 'model')
    with model_stage(sent, model_args=model_args, data_config=data_config, label_names=label_names) as stage:
        contents = {**{path.name: path for path in stage.iterdir()}, **card}
        return upload(contents, repo_id, commit_message=commit_message, private=private, token=token, revision=revision,
                      create_pr=create_pr)


def _license_of(model: nn.Module) -> str | None:
    """Return the licence of a backbone's weights, as timm says."""
    return (getattr(model, 'pretrained_cfg', None) or {}).get('license')
