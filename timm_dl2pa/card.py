"""Model cards: what a person wants to know of a head, and the metadata that the Hub understands."""
from typing import Any

from .head import DL2PAHead

__all__ = ['head_card']

_CITATION = """```bibtex
@inproceedings{saadabadi2024hyperspherical,
  title={Hyperspherical Classification with Dynamic Label-to-Prototype Assignment},
  author={Saadabadi, Mohammad Saeed Ebrahimi and Dabouei, Ali and Malakshan, Sahar Rahimi and Nasrabadi, Nasser M.},
  booktitle={CVPR},
  year={2024}
}
```"""


def head_card(
        head: DL2PAHead,
        repo_id: str,
        *,
        label_names: list[str] | None = None,
        base_model: str | None = None,
        metrics: dict[str, float] | None = None,
        license: str | None = None,
) -> str:
    """Return the card of a head alone, as Markdown with YAML metadata."""
    from huggingface_hub import EvalResult, ModelCardData
    name = repo_id.rpartition('/')[2]
    results = None
    if metrics:
        results = [EvalResult(task_type='image-classification', dataset_type='unknown', dataset_name='unknown',
                              metric_type=metric, metric_value=value) for metric, value in metrics.items()]
    data = ModelCardData(
        library_name='timm_dl2pa', tags=['timm', 'dl2pa', 'image-classification', 'prototypes'],
        pipeline_tag='image-classification', base_model=base_model, license=license, eval_results=results,
        model_name=name if results else None)
    config = head.config
    scale = head.current_scale().item()
    rows: dict[str, Any] = {
        'classes': f'{config.num_classes:,}',
        'prototypes': f'{config.num_prototypes:,}, unit vectors in {config.dim:,} dimensions, fixed',
        'features of the backbone': f'{config.in_features:,}',
        'neck': config.neck,
        'scale of the cosines': f'{scale:.4g}' + (', learned' if config.learn_scale else ''),
        'parameters': f'{sum(parameter.numel() for parameter in head.parameters()):,}',
    }
    if base_model:
        rows = {'backbone': base_model, **rows}
    if metrics:
        rows.update(metrics)
    # Where it is not said, a person has to know.
    made = f'timm.create_model({base_model.removeprefix("timm/")!r}, pretrained=True)' if base_model else \
        '...  # the timm model that this head was trained on'
    parts = [
        f'---\n{data.to_yaml()}\n---',
        f'# {name}',
        'A classifier head on fixed prototypes for a timm model: Hyperspherical Classification with Dynamic '
        'Label-to-Prototype Assignment (DL2PA, CVPR 2024). It is the head alone; the backbone is needed beside it.',
        f"```python\nimport timm\nfrom timm_dl2pa import wrap_dl2pa\n\nbackbone = {made}\n"
        f"model = wrap_dl2pa(backbone, head={repo_id!r})\n```",
        '\n'.join(['| | |', '|---|---|', *(f'| {key} | {value} |' for key, value in rows.items())]),
    ]
    if label_names:
        shown = ', '.join(label_names[:20]) + (f' and {len(label_names) - 20:,} more' if len(label_names) > 20 else '')
        parts.append(f'Classes: {shown}.')
    return '\n\n'.join([*parts, '## Citation', _CITATION]) + '\n'
