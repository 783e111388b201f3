"""Model cards: a description of a head or model in Markdown, with metadata for the Hub."""
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from ..prototypes.nearest import nearest_pairs
from ..values import checked_value
from .card_picture import draw_card
from .labels import LabelNames, read_label_names
from .markdown import code, escaped, table

__all__ = ['CARD_NAME', 'PICTURE_NAME', 'Facts', 'Training', 'card_files']

CARD_NAME, PICTURE_NAME = 'README.md', 'prototypes.png'

_METHOD = 'Hyperspherical Classification with Dynamic Label-to-Prototype Assignment (DL2PA, CVPR 2024)'
_CITATION = """```bibtex
@inproceedings{saadabadi2024hyperspherical,
  title={Hyperspherical Classification with Dynamic Label-to-Prototype Assignment},
  author={Saadabadi, Mohammad Saeed Ebrahimi and Dabouei, Ali and Malakshan, Sahar Rahimi and Nasrabadi, Nasser M.},
  booktitle={CVPR},
  year={2024}
}
```"""
# The licences of timm's weights that have an identifier on the Hub. Any other is 'other', with its name.
_LICENSES = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'apple-ascl', 'apple-amlr', 'gemma')
_MAX_ROWS = 10
_MAX_LABELS = 20
_logger = logging.getLogger(__name__)


class Describable(Protocol):
    """The attributes of a head that a card needs."""
    config: Any
    num_classes: int
    class_prototypes: torch.Tensor

    def current_scale(self) -> torch.Tensor:
        """Return the factor on the cosines, a scalar tensor."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of the head."""


@dataclass(frozen=True)
class Training:
    """A record of a training, for the card.

    Attributes:
        epoch: The epoch of the checkpoint.
        epochs: The metrics of each epoch by name, 'epoch' among them: the rows of timm's summary.csv.
        settings: Arguments of the training script.
        history: The updates of the assignment, each with the values of an `AssignmentUpdate` by their names.
    """
    epoch: int | None = None
    epochs: Sequence[dict[str, float]] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    history: Sequence[dict[str, Any]] = ()

    def curve(self) -> dict[str, list[tuple[float, float]]]:
        """Return the recorded curves among 'train loss', 'loss', 'top-1' and 'top-5', as points (epoch, value)."""
        titles = {'train_loss': 'train loss', 'eval_loss': 'loss', 'eval_top1': 'top-1', 'eval_top5': 'top-5'}
        curves = {title: [(row['epoch'], row[name]) for row in self.epochs if name in row]
                  for name, title in titles.items()}
        return {title: points for title, points in curves.items() if points}


@dataclass(frozen=True)
class Facts:
    """Information for a card beyond what the head itself has.

    Attributes:
        backbone: The name of the timm model.
        label_names: The names of the C classes, see `read_label_names`.
        base_model: The Hub repository of the model that was fine-tuned.
        metrics: Metrics such as 'accuracy', as fractions.
        license: The licence of the repository, given by its owner.
        backbone_license: The licence of the backbone's pretrained weights, given by timm.
        class_means: (C, d), the mean directions of the classes' embeddings. Rows of zeros are unknown.
        training: The record of the training.
    """
    backbone: str | None = None
    label_names: LabelNames | None = None
    base_model: str | None = None
    metrics: Mapping[str, float] | None = None
    license: str | None = None
    backbone_license: str | None = None
    class_means: torch.Tensor | None = None
    training: Training | None = None


def card_files(head: Describable, repo_id: str, facts: Facts, *, kind: str) -> dict[str, bytes]:
    """Write a model card and its picture.

    The card is Markdown with YAML metadata. Without matplotlib there is no picture, and a warning is logged once.

    Args:
        head: The head, or the main head of the model.
        repo_id: The repository, 'user/name'.
        facts: Further information.
        kind: 'head', 'model', or 'folded' for a plain timm model.

    Returns:
        The contents of the files by name.

    Raises:
        ValueError: `class_means` does not have a row for each class, or `label_names` not a name,
            or a metric is no finite number.
    """
    if facts.class_means is not None and facts.class_means.shape != head.class_prototypes.shape:
        raise ValueError(f'class_means must have the shape {tuple(head.class_prototypes.shape)}, one row for each '
                         f'class, not {tuple(facts.class_means.shape)}.')
    facts = replace(facts, label_names=read_label_names(facts.label_names, head.num_classes),
                    metrics=_checked_metrics(facts.metrics))
    training = facts.training or Training()
    files = {}
    try:
        files[PICTURE_NAME] = draw_card(
            head.class_prototypes, facts.class_means, facts.label_names, training.curve())
    except ModuleNotFoundError as error:
        _warn_once(f'The model card has no picture, which needs {error.name}: pip install "timm-dl2pa[demo]"')
    parts = [
        f'---\n{_metadata(repo_id, facts, kind)}\n---',
        f'# {repo_id.rpartition("/")[2]}',
        _introduction(facts, kind),
        f'```python\n{_usage(repo_id, facts, kind)}\n```',
        _head_table(head, facts, kind),
    ]
    if facts.label_names:
        shown = ', '.join(map(escaped, facts.label_names[:_MAX_LABELS]))
        more = len(facts.label_names) - _MAX_LABELS
        parts.append(f'Classes: {shown}{f" and {more:,} more" if more > 0 else ""}.')
    parts.append('## Class prototypes')
    if files:
        means = ', and the mean directions of their embeddings in training (dots)' if facts.class_means is not None \
            else ''
        parts.append(f'![Class prototypes]({PICTURE_NAME})\n\n*The prototypes of the classes (stars){means}, '
                     f'in the plane of their largest variance.*')
    parts.append(_nearest_table(head, facts))
    if facts.training is not None:
        parts += _training_section(training, head.num_classes)
    return {CARD_NAME: ('\n\n'.join([*parts, '## Citation', _CITATION]) + '\n').encode(), **files}


def _checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """Return metrics as Python's numbers, which YAML and the Hub understand."""
    if not isinstance(metrics, Mapping | None):
        raise ValueError(f"metrics must be a mapping such as {{'accuracy': 0.81}}, not {metrics!r}.")
    checked = {checked_value('the name of a metric', name, str): checked_value(f'metrics: {name}', value, (int, float))
               for name, value in (metrics or {}).items()}
    for name, value in checked.items():
        if not math.isfinite(value):
            raise ValueError(f'metrics: {name} must be finite, not {value}.')
    return checked


@functools.cache
def _warn_once(message: str) -> None:
    _logger.warning(message)


def _metadata(repo_id: str, facts: Facts, kind: str) -> str:
    """Return the YAML metadata for the Hub."""
    from huggingface_hub import EvalResult, ModelCardData
    license, license_name = facts.license, {}
    if license is None and kind != 'head' and facts.backbone_license not in (None, 'unknown'):
        license = facts.backbone_license
        if license not in _LICENSES:
            license, license_name = 'other', {'license_name': license}
    results = [EvalResult(
        task_type='image-classification', dataset_type='unknown', dataset_name='unknown', metric_name=name,
        metric_type='accuracy' if name.endswith('accuracy') else name, metric_value=value)
        for name, value in (facts.metrics or {}).items()]
    return ModelCardData(
        library_name='timm_dl2pa' if kind == 'head' else 'timm',
        tags=['timm', *([] if kind == 'folded' else ['timm_dl2pa']), 'dl2pa', 'image-classification', 'prototypes'],
        pipeline_tag='image-classification',
        base_model=facts.base_model,
        license=license or None,
        metrics=sorted({result.metric_type for result in results}) or None,
        eval_results=results or None,
        model_name=repo_id.rpartition('/')[2] if results else None,
        **license_name,
    ).to_yaml()


def _introduction(facts: Facts, kind: str) -> str:
    if kind == 'head':
        return f'A classifier head on fixed prototypes for a timm model: {_METHOD}. This is the head alone, without ' \
               f'the backbone.'
    text = f'{code(facts.backbone or "a timm model")}, trained with a classifier head on fixed prototypes: {_METHOD}.'
    if kind == 'folded':
        text += ' The head was folded into a linear classifier, which ranks the classes of every image in the same ' \
                'order; the probabilities differ. The model needs timm alone.'
    return text


def _usage(repo_id: str, facts: Facts, kind: str) -> str:
    """Return the Python code that loads the head or model."""
    if kind == 'head':
        base = facts.base_model
        backbone = f'timm.create_model({base.removeprefix("timm/")!r}, pretrained=True)' if base else \
            '...  # the timm model that this head was trained on'
        return f'import timm\nfrom timm_dl2pa import wrap_dl2pa\n\nbackbone = {backbone}\n' \
               f'model = wrap_dl2pa(backbone, head={repo_id!r})'
    return 'import timm\n' + ('' if kind == 'folded' else 'import timm_dl2pa\n') + \
        f"\nmodel = timm.create_model('hf-hub:{repo_id}', pretrained=True)"


def _head_table(head: Describable, facts: Facts, kind: str) -> str:
    """Return a table of the head's sizes and settings, and the metrics."""
    config, scale = head.config, head.current_scale().item()
    rows: dict[str, Any] = {
        'backbone': code(facts.backbone or facts.base_model) if facts.backbone or facts.base_model else None,
        "licence of the backbone's weights in timm": code(facts.backbone_license) if facts.backbone_license else None,
        'classes': f'{config.num_classes:,}',
        'prototypes': f'{config.num_prototypes:,}, unit vectors in {config.dim:,} dimensions, fixed',
        'features of the backbone': f'{config.in_features:,}',
        'neck': config.neck,
        'scale of the cosines': f'{scale:.4g}' + (', learned' if config.learn_scale and not config.held_scale else ''),
        'parameters of the head': f'{sum(parameter.numel() for parameter in head.parameters()):,}',
        **{escaped(name): value for name, value in facts.metrics.items()},
    }
    if kind == 'folded':
        rows = {('parameters of the head, before folding' if name.startswith('param') else name): value
                for name, value in rows.items()}
    return table(['', ''], [[name, value] for name, value in rows.items() if value is not None])


def _nearest_table(head: Describable, facts: Facts) -> str:
    """Return a table of the nearest pairs of classes, by the class means if they are known, or by the prototypes."""
    vectors = head.class_prototypes.detach().float().cpu()
    criterion = 'their prototypes'
    labels = torch.arange(head.num_classes)
    if facts.class_means is not None:
        means = facts.class_means.detach().float().cpu()
        known = (means.norm(dim=1) > 0).nonzero().flatten()
        if len(known) > 1:
            criterion, labels, vectors = 'the mean directions of their embeddings in training', known, means[known]
    pairs = nearest_pairs(torch.nn.functional.normalize(vectors, dim=1), _MAX_ROWS)
    rows = [[*(_class_name(labels[index].item(), facts.label_names) for index in pair), f'{angle:.1f}']
            for *pair, angle in pairs]
    return f'Nearest classes, by {criterion}:\n\n' + table(['class', 'nearest class', 'angle in degrees'], rows)


def _class_name(index: int, label_names: Sequence[str] | None) -> str:
    return str(index) if label_names is None else escaped(label_names[index])


def _training_section(training: Training, num_classes: int) -> list[str]:
    """Return the paragraphs on the training: settings, metrics of the epochs, and re-solves."""
    parts = ['## Training']
    if training.settings:
        parts.append(', '.join(f'{escaped(name)} {escaped(value)}' for name, value in training.settings.items()) + '.')
    names = [name for name in ('train_loss', 'eval_loss', 'eval_top1', 'eval_top5')
             if any(name in row for row in training.epochs)]
    if names:
        rows = [['**this**' if row['epoch'] == training.epoch else '', int(row['epoch']),
                 *(f'{row[name]:.4g}' if name in row else '' for name in names)]
                for row in _evenly_spaced(training.epochs, training.epoch)]
        parts.append(table(['', 'epoch', *(name.replace('_', ' ') for name in names)], rows))
    if training.history:
        rows = [[*(escaped(entry[name]) for name in ('event', 'epoch', 'step', 'moved')),
                 f'{entry["objective_before"] / num_classes:.4f}', f'{entry["objective"] / num_classes:.4f}']
                for entry in _evenly_spaced(training.history, None)]
        solves = sum(entry['event'] == 'resolve' for entry in training.history)
        parts.append(f'The assignment of classes to prototypes was recomputed {solves} times. The '
                     f'objective is the mean cosine of a class\'s mean direction with its prototype.\n\n'
                     + table(['', 'epoch', 'batch', 'classes moved', 'objective before', 'after'], rows))
    return parts


def _evenly_spaced(rows: Sequence[dict[str, Any]], epoch: int | None) -> list[dict[str, Any]]:
    """Return at most a dozen evenly spaced rows, with the first, the last and the row of the epoch among them."""
    if len(rows) <= _MAX_ROWS:
        return list(rows)
    chosen = {round(index * (len(rows) - 1) / (_MAX_ROWS - 1)) for index in range(_MAX_ROWS)}
    chosen |= {index for index, row in enumerate(rows) if row['epoch'] == epoch}
    return [rows[index] for index in sorted(chosen)]
