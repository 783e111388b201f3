"""Every model that timm lists, wrapped: what runs, and if not, why.

    python benchmarks/architectures.py                          # goes on where it was interrupted
    python benchmarks/architectures.py --pattern 'resnet*'      # some, printed and not written

Each model is made without pretrained weights for 7 classes, wrapped with d = 4, and run on the smallest square images
that it takes (`input_size`). On real tensors (`checked`: "run") where the model has no more than `--max-parameters`,
otherwise on the meta device ("shapes"): in evaluation and, with a backward pass, in training. What must hold stands in
`check`; timm's own classifier is measured beside it.
"""
import argparse
import collections
import gc
import json
import sys
import warnings
from typing import Any

import timm
import torch
import torch.nn as nn
from results_file import RESULTS, write_results
from timm.models._registry import _model_to_module
from tqdm import tqdm

from timm_dl2pa import DL2PAHead, fold_dl2pa, make_prototypes, wrap_dl2pa
from timm_dl2pa.head import heads_of

CLASSES, DIM = 7, 4
SIZES = (32, 48, 64, 96, 112, 128, 160, 192, 224, 256, 288, 384, 448, 512)
FINISHED = RESULTS / 'architectures.json'
UNFINISHED = RESULTS / 'architectures.jsonl'


def make(name: str, size: int, device: str, **kwargs: Any) -> nn.Module:
    """Make a timm model for images of size x size, told to it if it wants to know."""
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    with torch.device(device):
        return timm.create_model(name, num_classes=CLASSES, **({'img_size': size} if fixed else {}), **kwargs)


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out = model(x)
    return sum(out) if isinstance(out, tuple) else out


def smallest(name: str) -> tuple[int, nn.Module]:
    """Return the smallest image size that timm's own model takes, and that model on the meta device."""
    cfg = timm.get_pretrained_cfg(name)
    sizes = sorted({*SIZES, cfg.input_size[-1]})
    model = None
    for size in sizes:
        try:
            if model is None or cfg.fixed_input_size:
                model = make(name, size, 'meta').eval()
                if not hasattr(model, 'get_classifier'):
                    break
            with torch.no_grad():
                model(torch.empty(2, 3, size, size, device='meta'))
            return size, model
        except Exception as error:
            if size == sizes[-1]:
                raise RuntimeError(f"timm's own model cannot be run: {error}") from error
    return 0, wrap_dl2pa(model, DIM)  # which says why it cannot be


def with_gradient(model: nn.Module, x: torch.Tensor) -> set[str]:
    """Return the names of the parameters that a backward pass in training reaches."""
    model.train().zero_grad(set_to_none=True)
    forward(model, x).float().square().sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def has_finite_gradients(model: nn.Module) -> bool | None:
    """Return whether all gradients are finite; None on the meta device."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return None if gradients[0].is_meta else all(bool(gradient.isfinite().all()) for gradient in gradients)


def is_composed(model: nn.Module, x: torch.Tensor) -> bool | None:
    """Return whether forward is forward_head after forward_features; None where the model has no such parts."""
    model.eval()
    try:
        parts = model.forward_head(model.forward_features(x))
    except Exception:
        return None
    whole = model(x)
    return parts.shape == whole.shape and (x.is_meta or torch.allclose(parts, whole, atol=1e-4))


def check(name: str, max_parameters: int) -> dict[str, Any]:
    """Wrap one model and check it, beside timm's own.

    Raises:
        AssertionError: The message says what does not hold.
    """
    size, model = smallest(name)
    parameters = sum(p.numel() for p in model.parameters())
    result = {'parameters': parameters, 'input_size': size, 'checked': 'shapes'}
    x = torch.empty(2, 3, size, size, device='meta')
    if parameters <= max_parameters:
        result['checked'] = 'run'
        model, x = make(name, size, 'cpu'), torch.rand(2, 3, size, size)
    expected = with_gradient(model, x)
    # Deep batch norms over two images of a pixel each may explode, whatever the classifier.
    finite = has_finite_gradients(model)
    composed = is_composed(model, x)
    backbone = {parameter: id(tensor) for parameter, tensor in model.named_parameters()}
    timms_shapes = {key: value.shape for key, value in model.state_dict().items()}

    wrap_dl2pa(model, DIM, prototypes=make_prototypes(CLASSES, DIM))
    heads = {path: module for path, module in model.named_modules() if isinstance(module, DL2PAHead)}
    result.update(heads=list(heads), composed=composed)
    found = model.get_classifier()
    assert all(isinstance(head, DL2PAHead) for head in (found if isinstance(found, tuple) else (found,))), \
        'get_classifier() is not our head'

    kept = {id(tensor): parameter for parameter, tensor in model.named_parameters()}
    names = {old: kept[key] for old, key in backbone.items() if key in kept}
    lost = [old for old in backbone if old not in names]
    assert len(lost) <= 2 * len(heads), f'more than the linear layers was taken away: {lost}'
    ours = with_gradient(model, x)
    missing = [old for old in expected if old in names and names[old] not in ours]
    assert not missing, f'no gradient reaches {missing}'
    new = {parameter for path, head in heads.items() for parameter, _ in head.neck.named_parameters(f'{path}.neck')}
    if len(heads) == 1:
        assert new <= ours, f'no gradient reaches {sorted(new - ours)}'
    if has_finite_gradients(model) is False:
        assert finite is False, 'gradients not finite'
        result['finite'] = False  # nor are those of timm's own model

    with torch.no_grad(), torch.device(x.device):
        logits = model.eval()(x)
        assert logits.shape == (2, CLASSES), f'logits {tuple(logits.shape)}'
        ours_composed = is_composed(model, x)
        assert ours_composed == composed, f'forward is forward_head(forward_features): {ours_composed}, not {composed}'
        model.zero_grad(set_to_none=True)
        if len(heads) == 1:
            folded = fold_dl2pa(model)
            shapes = {key: value.shape for key, value in folded.state_dict().items()}
            assert shapes == timms_shapes, "folded: other tensors than timm's"
            if not x.is_meta:
                check_folded(logits, folded(x))
            del folded
        model.reset_classifier(0)
        assert not any(isinstance(module, DL2PAHead) for module in model.modules()), 'reset_classifier(0) left a head'
        embeddings = model(x)
        result['embedding'] = list(embeddings.shape[1:]) if isinstance(embeddings, torch.Tensor) else None
        model.reset_classifier(5)
        assert isinstance(next(iter(heads_of(model))), DL2PAHead) and model(x).shape == (2, 5), 'reset_classifier(5)'
    return result


def check_folded(logits: torch.Tensor, plain: torch.Tensor) -> None:
    """Folded logits are ours times one positive number an image, the length of its embedding before division."""
    logits, plain = logits.double(), plain.double()
    length = (plain * logits).sum(1, keepdim=True) / logits.square().sum(1, keepdim=True)
    error = (plain - length * logits).abs().max() / plain.abs().max()
    assert (length > 0).all() and error < 1e-3, f'folded: logits differ by {error:.1e}'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pattern', default='', help="timm's, for some models only: prints, and writes no file")
    parser.add_argument('--max-parameters', type=float, default=4e8, help='of a model on real tensors')
    parser.add_argument('--resume', action='store_true', help='keep what the committed results have')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    names = [name for name in timm.list_models(args.pattern) if name != 'dl2pa']
    done: dict[str, dict] = {}
    if args.resume:
        done = {record['model']: record for record in json.loads(FINISHED.read_text())['results']}
    if not args.pattern and UNFINISHED.exists():
        done.update((record['model'], record) for record in map(json.loads, UNFINISHED.read_text().splitlines()))
    # Tried again: what failed, and what was checked for shapes alone and now is to run.
    done = {name: record for name, record in done.items() if record['ok']
            and (record['checked'] == 'run' or record['parameters'] > args.max_parameters)}
    for name in tqdm([name for name in names if name not in done], unit='model', initial=len(done), total=len(names),
                     file=sys.stderr, disable=None):
        torch.manual_seed(args.seed)
        record: dict[str, Any] = {'model': name, 'module': _model_to_module[name]}
        try:
            record.update(check(name, int(args.max_parameters)), ok=True)
        except Exception as error:
            record.update(ok=False, why=f'{type(error).__name__}: {error}'.splitlines()[0][:300])
            tqdm.write(f'{name}: {record["why"]}')
        gc.collect()
        done[name] = record
        if not args.pattern:
            with UNFINISHED.open('a') as file:
                file.write(json.dumps(record) + '\n')
        else:
            tqdm.write(json.dumps(record))
    records = [done[name] for name in names]
    counts = collections.Counter((record['ok'], record.get('checked')) for record in records)
    print(f'{len(records)} models in {len({record["module"] for record in records})} modules: {dict(counts)}')
    if not args.pattern:
        print(write_results('architectures', vars(args) | {'num_classes': CLASSES, 'dim': DIM}, records))
        UNFINISHED.unlink()
    return 0


if __name__ == '__main__':
    sys.exit(main())
