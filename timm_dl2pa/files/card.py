"""Model cards: what a person wants to know of a head, and the metadata that the Hub understands."""
import functools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..prototypes.nearest import margins
from .card_picture import draw_card

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
# Licences that the Hub has a name for, among those of timm's weights; any other is 'other', with its name.
_LICENSES = ('apache-2.0', 'mit', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'apple-ascl', 'apple-amlr', 'gemma')
_ROWS = 10
_logger = logging.getLogger(__name__)


class Describable(Protocol):
    """What a card needs of a head."""
    config: Any
    num_classes: int
    class_prototypes: torch.Tensor

    def current_scale(self) -> torch.Tensor:
        """Return the factor on the cosines, ()."""

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters."""


@dataclass(frozen=True)
class Training:
    """What a training left behind.

    Attributes:
        epoch: Of the checkpoint.
        epochs: For each epoch its figures by name, 'epoch' among them: the rows of timm's summary.csv.
        settings: Arguments of the script.
        history: The re-solves: 'epoch', 'step', 'moved', 'objective_before', 'objective' of each.
    """
    epoch: int | None = None
    epochs: Sequence[dict[str, float]] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    history: Sequence[dict[str, Any]] = ()

    def curve(self) -> dict[str, list[tuple[float, float]]]:
        """Return lines over epochs: 'train loss', 'loss', 'top-1', 'top-5', those that there are."""
        names = {'train_loss': 'train loss', 'eval_loss': 'loss', 'eval_top1': 'top-1', 'eval_top5': 'top-5'}
        lines = {shown: [(row['epoch'], row[name]) for row in self.epochs if name in row]
                 for name, shown in names.items()}
        return {shown: line for shown, line in lines.items() if line}


@dataclass(frozen=True)
class Facts:
    """What a card may say beside what the head itself tells.

    Attributes:
        backbone: Name of the timm model.
        label_names: C names of the classes.
        base_model: The repository that was trained further.
        metrics: 'accuracy' and the like, as fractions.
        license: Of the repository, as its owner says.
        backbone_license: Of the backbone's weights, as timm says.
        class_means: (C, d) mean directions of the classes' embeddings; zero rows are unknown.
        training: What was trained.
    """
    backbone: str | None = None
    label_names: Sequence[str] | None = None
    base_model: str | None = None
    metrics: dict[str, float] | None = None
    license: str | None = None
    backbone_license: str | None = None
    class_means: torch.Tensor | None = None
    training: Training | None = None


def card_files(head: Describable, repo_id: str, facts: Facts, *, kind: str) -> dict[str, bytes]:
    """Return the contents of the card, Markdown with YAML metadata, and of its picture, by their names.

    Without matplotlib there is no picture.

    Args:
        head: The head, or the main one of the model.
        repo_id: 'me/name'.
        facts: What else is known.
        kind: 'head', 'model', or 'folded' for a plain timm model.
    """
    if facts.class_means is not None and facts.class_means.shape != head.class_prototypes.shape:
        raise ValueError(f'class_means must have the shape {tuple(head.class_prototypes.shape)}, a row a class, not '
                         f'{tuple(facts.class_means.shape)}.')
    training = facts.training or Training()
    files = {}
    try:
        files[PICTURE_NAME] = draw_card(
            head.class_prototypes, facts.class_means, facts.label_names, training.curve())
    except ModuleNotFoundError as error:
        _say(f'The model card has no picture, which needs {error.name}: pip install "timm-dl2pa[demo]"')
    parts = [
        f'---\n{_metadata(repo_id, facts, kind)}\n---',
        f'# {repo_id.rpartition("/")[2]}',
        _what(facts, kind),
        f'```python\n{_loading(repo_id, facts, kind)}\n```',
        _head_table(head, facts, kind),
    ]
    if facts.label_names:
        shown = ', '.join(facts.label_names[:20])
        more = len(facts.label_names) - 20
        parts.append(f'Classes: {shown}{f" and {more:,} more" if more > 0 else ""}.')
    parts.append('## Where the classes stand')
    if files:
        means = ', and the mean directions of their embeddings in training (dots)' if facts.class_means is not None \
            else ''
        parts.append(f'![Where the classes stand]({PICTURE_NAME})\n\n*The prototypes of the classes (stars){means}, '
                     f'in the plane in which they spread most.*')
    parts.append(_nearest_table(head, facts))
    if facts.training is not None:
        parts += _training(training, head.num_classes)
    return {CARD_NAME: ('\n\n'.join([*parts, '## Citation', _CITATION]) + '\n').encode(), **files}


@functools.cache
def _say(message: str) -> None:
    """Warn, once."""
    _logger.warning(message)


def _metadata(repo_id: str, facts: Facts, kind: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData
    license, named = facts.license, {}
    if license is None and kind != 'head' and facts.backbone_license not in (None, 'unknown'):
        license = facts.backbone_license
        if license not in _LICENSES:
            license, named = 'other', {'license_name': license}
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
        **named,
    ).to_yaml()


def _what(facts: Facts, kind: str) -> str:
    if kind == 'head':
        return f'A classifier head on fixed prototypes for a timm model: {_METHOD}. It is the head alone; the ' \
               f'backbone is needed beside it.'
    what = f'{facts.backbone}, trained with a classifier head on fixed prototypes: {_METHOD}.'
    if kind == 'folded':
        what += ' The head was folded into a linear classifier, which ranks classes as it did; probabilities differ. ' \
                'It needs timm alone.'
    return what


def _loading(repo_id: str, facts: Facts, kind: str) -> str:
    if kind == 'head':
        # Where it is not said, a person has to know.
        base = facts.base_model
        made = f'timm.create_model({base.removeprefix("timm/")!r}, pretrained=True)' if base else \
            '...  # the timm model that this head was trained on'
        return f'import timm\nfrom timm_dl2pa import wrap_dl2pa\n\nbackbone = {made}\n' \
               f'model = wrap_dl2pa(backbone, head={repo_id!r})'
    return 'import timm\n' + ('' if kind == 'folded' else 'import timm_dl2pa\n') + \
        f"\nmodel = timm.create_model('hf-hub:{repo_id}', pretrained=True)"


def _head_table(head: Describable, facts: Facts, kind: str) -> str:
    config, scale = head.config, head.current_scale().item()
    rows: dict[str, Any] = {
        'backbone': facts.backbone or facts.base_model,
        "licence of the backbone's weights in timm": facts.backbone_license,
        'classes': f'{config.num_classes:,}',
        'prototypes': f'{config.num_prototypes:,}, unit vectors in {config.dim:,} dimensions, fixed',
        'features of the backbone': f'{config.in_features:,}',
        'neck': config.neck,
        'scale of the cosines': f'{scale:.4g}' + (', learned' if config.learn_scale else ''),
        'parameters of the head': f'{sum(parameter.numel() for parameter in head.parameters()):,}',
        **(facts.metrics or {}),
    }
    if kind == 'folded':
        rows = {('parameters of the head, before folding' if name.startswith('param') else name): value
                for name, value in rows.items()}
    return _table(['', ''], [[name, value] for name, value in rows.items() if value is not None])


def _nearest_table(head: Describable, facts: Facts) -> str:
    """The pairs of classes that stand nearest: by their means where they are known, otherwise by their prototypes."""
    vectors = head.class_prototypes.detach().float().cpu()
    by = 'their prototypes'
    known = torch.arange(head.num_classes)
    if facts.class_means is not None:
        means = facts.class_means.detach().float().cpu()
        seen = (means.norm(dim=1) > 0).nonzero().flatten()
        if len(seen) > 1:
            by, known, vectors = 'the mean directions of their embeddings in training', seen, means[seen]
    angles, nearest = margins(torch.nn.functional.normalize(vectors, dim=1))
    rows, shown = [], set()
    for index in angles.argsort(stable=True).tolist():
        pair = frozenset((index, nearest[index].item()))
        if pair not in shown and len(rows) < _ROWS:
            shown.add(pair)
            one, other = (_name(known[place].item(), facts.label_names) for place in (index, nearest[index].item()))
            rows.append([one, other, f'{angles[index]:.1f}'])
    return f'Nearest classes, by {by}:\n\n' + _table(['class', 'nearest to it', 'degrees apart'], rows)


def _name(index: int, label_names: Sequence[str] | None) -> str:
    return str(index) if label_names is None else f'{label_names[index]}'


def _training(training: Training, num_classes: int) -> list[str]:
    parts = ['## Training']
    if training.settings:
        parts.append(', '.join(f'{name} {value}' for name, value in training.settings.items()) + '.')
    names = [name for name in ('train_loss', 'eval_loss', 'eval_top1', 'eval_top5')
             if any(name in row for row in training.epochs)]
    if names:
        rows = [['**this**' if row['epoch'] == training.epoch else '', int(row['epoch']),
                 *(f'{row[name]:.4g}' if name in row else '' for name in names)]
                for row in _some(training.epochs, training.epoch)]
        parts.append(_table(['', 'epoch', *(name.replace('_', ' ') for name in names)], rows))
    if training.history:
        rows = [[entry['epoch'], entry['step'], entry['moved'],
                 f'{entry["objective_before"] / num_classes:.4f}', f'{entry["objective"] / num_classes:.4f}']
                for entry in _some(training.history, None)]
        parts.append(f'Classes were assigned to prototypes anew {len(training.history)} times. The objective is the '
                     f'mean cosine of a class\'s mean direction with its prototype.\n\n'
                     + _table(['epoch', 'batch', 'classes moved', 'objective before', 'after'], rows))
    return parts


def _some(rows: Sequence[dict[str, Any]], epoch: int | None) -> list[dict[str, Any]]:
    """Return at most a dozen rows, evenly spaced: the first, the last and that of the epoch among them."""
    if len(rows) <= _ROWS:
        return list(rows)
    chosen = {round(index * (len(rows) - 1) / (_ROWS - 1)) for index in range(_ROWS)}
    chosen |= {index for index, row in enumerate(rows) if row['epoch'] == epoch}
    return [rows[index] for index in sorted(chosen)]


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join('| ' + ' | '.join(' '.join(str(cell).split()).replace('|', '\\|') for cell in line) + ' |'
                     for line in lines)
