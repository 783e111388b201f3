"""Model cards: what a person wants to know of a head, and the metadata that the Hub understands."""
from typing import Any

from .head import DL2PAHead

__all__ = ['head_card', 'model_card']

_METHOD = 'Hyperspherical Classification with Dynamic Label-to-Prototype Assignment (DL2PA, CVPR 2024)'
_CITATION = """```bibtex
@inproceedings{saadabadi2024hyperspherical,
  title={Hyperspherical Classification with Dynamic Label-to-Prototype Assignment},
  author={Saadabadi, Mohammad Saeed Ebrahimi and Dabouei, Ali and Malakshan, Sahar Rahimi and Nasrabadi, Nasser M.},
  booktitle={CVPR},
  year={2024}
}
```"""


def head_card(head: DL2PAHead, repo_id: str, **known: Any) -> str:
    """Return the card of a head alone, as Markdown with YAML metadata; `known`: see `_card`."""
    base_model = known.get('base_model')
    # Where it is not said, a person has to know.
    made = f'timm.create_model({base_model.removeprefix("timm/")!r}, pretrained=True)' if base_model else \
        '...  # the timm model that this head was trained on'
    load = f'import timm\nfrom timm_dl2pa import wrap_dl2pa\n\nbackbone = {made}\n' \
           f'model = wrap_dl2pa(backbone, head={repo_id!r})'
    what = f'A classifier head on fixed prototypes for a timm model: {_METHOD}. It is the head alone; the backbone ' \
           'is needed beside it.'
    return _card(head, repo_id, what, load, 'timm_dl2pa', **known)


def model_card(head: DL2PAHead, repo_id: str, *, folded: bool, backbone: str, **known: Any) -> str:
    """Return the card of a whole model; `known`: see `_card`."""
    load = 'import timm\n' + ('' if folded else 'import timm_dl2pa\n') + \
        f"\nmodel = timm.create_model('hf-hub:{repo_id}', pretrained=True)"
    what = f'{backbone}, trained with a classifier head on fixed prototypes: {_METHOD}.'
    if folded:
        what += ' The head was folded into a linear classifier, which ranks classes as it did; probabilities differ. ' \
                'It needs timm alone.'
    return _card(head, repo_id, what, load, 'timm', backbone=backbone, **known)


def _card(
        head: DL2PAHead,
        repo_id: str,
        what: str,
        load: str,
        library: str,
        *,
        backbone: str | None = None,
        label_names: list[str] | None = None,
        base_model: str | None = None,
        metrics: dict[str, float] | None = None,
        license: str | None = None,
) -> str:
    from huggingface_hub import EvalResult, ModelCardData
    name = repo_id.rpartition('/')[2]
    results = None
    if metrics:
        results = [EvalResult(task_type='image-classification', dataset_type='unknown', dataset_name='unknown',
                              metric_type=metric, metric_value=value) for metric, value in metrics.items()]
    data = ModelCardData(
        library_name=library, tags=['timm', 'dl2pa', 'image-classification', 'prototypes'],
        pipeline_tag='image-classification', base_model=base_model, license=license, eval_results=results,
        model_name=name if results else None)
    config, scale = head.config, head.current_scale().item()
    rows: dict[str, Any] = {
        'backbone': backbone or base_model,
        'classes': f'{config.num_classes:,}',
        'prototypes': f'{config.num_prototypes:,}, unit vectors in {config.dim:,} dimensions, fixed',
        'features of the backbone': f'{config.in_features:,}',
        'neck': config.neck,
        'scale of the cosines': f'{scale:.4g}' + (', learned' if config.learn_scale else ''),
        'parameters of the head': f'{sum(parameter.numel() for parameter in head.parameters()):,}',
        **(metrics or {}),
    }
    table = ['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items() if value is not None)]
    parts = [
        f'---\n{data.to_yaml()}\n---',
        f'# {name}',
        what,
        f'```python\n{load}\n```',
        '\n'.join(table),
    ]
    if label_names:
        shown = ', '.join(label_names[:20]) + (f' and {len(label_names) - 20:,} more' if len(label_names) > 20 else '')
        parts.append(f'Classes: {shown}.')
    return '\n\n'.join([*parts, '## Citation', _CITATION]) + '\n'
