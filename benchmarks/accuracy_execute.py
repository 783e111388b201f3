"""A recipe run to its record: one JSON file a run, with a checkpoint beside it until it is complete."""
import json
import os
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accuracy_recipe import Recipe
from accuracy_run import Run, precision
from image_arrays import Images, hold_out, keep_classes, long_tail
from results_file import environment
from tqdm import tqdm

__all__ = ['execute']

# A checkpoint is written after an epoch if the last one is older than so many seconds.
_SAVE_EVERY = 10.0


def execute(recipe: Recipe, images: Images, device: torch.device, folder: Path, command: str,
            until: float = float('inf')) -> dict[str, Any] | None:
    """Run a recipe, or go on with it, and return its record; at once if its file is there.

    Args:
        recipe: What to run.
        images: What to train and test on.
        device: Where.
        folder: Holds the record, and the checkpoint until then.
        command: What the record says made it.
        until: By `time.time()`: if another epoch might not be over by then the run ends with a checkpoint, and the
            next call goes on from it.

    Returns:
        The record; None if there was no time to finish.

    Raises:
        FileNotFoundError: The backbone to start from is not there.
    """
    path = folder / f'{recipe.name()}.json'
    if path.exists():
        return json.loads(path.read_text())
    checkpoint = path.with_suffix('.ckpt')
    backbone = None
    if recipe.start_from:
        source = replace(Recipe(), method='softmax', dim=0, model=recipe.model, shortcut=recipe.shortcut,
                         image_size=recipe.image_size, classes=recipe.start_from, validation=recipe.validation,
                         seed=recipe.seed)
        backbone = folder / f'{source.name()}.pt'
        if not backbone.exists():
            raise FileNotFoundError(f'{backbone} holds the backbone to start from: run --method softmax --dim 0 '
                                    f'--classes {recipe.start_from} --seed {recipe.seed} first.')
    if recipe.validation:
        images = hold_out(images)
    held_out = None
    if recipe.classes != 'all':
        half = images.num_classes // 2
        halves = [keep_classes(images, list(numbers)) for numbers in (range(half), range(half, images.num_classes))]
        images, held_out = halves if recipe.classes == 'first_half' else halves[::-1]
    if recipe.imbalance:
        images = long_tail(images, recipe.imbalance)
    run = Run(recipe, images, device)
    if checkpoint.exists():
        run.load(checkpoint)
    elif backbone is not None:
        run.start_from(torch.load(backbone, map_location=device, weights_only=True))
    bar = tqdm(range(run.epoch, recipe.epochs), recipe.name(), initial=run.epoch, total=recipe.epochs, unit='epoch',
               disable=None)
    saved = time.time()
    for epoch in bar:
        began = time.time()
        run.train_epoch()
        now = time.time()
        out_of_time = now + 1.5 * (now - began) > until and epoch + 1 < recipe.epochs
        if out_of_time or now - saved > _SAVE_EVERY or epoch + 1 == recipe.epochs:
            run.save(checkpoint)
            saved = now
        bar.set_postfix(run.curve[-1])
        if out_of_time:
            return None
    record = {
        'command': command,
        'recipe': asdict(recipe),
        'precision': precision(recipe, device),
        'step': run.step_kind(),
        'environment': environment(),
        'results': {name: value if isinstance(value, dict) else round(value, 3)
                    for name, value in run.results(held_out).items()},
        'before_training': run.before_training,
        'training_seconds': round(run.seconds, 1),
        'peak_gpu_mb': round(torch.cuda.max_memory_allocated() / 2 ** 20) if device.type == 'cuda' else None,
        'peak_memory_mb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10),
        'moved': run.moved(),
        'curve': run.curve,
    }
    part = path.with_suffix('.json.part')
    part.write_text(json.dumps(record, indent=1) + '\n')
    if recipe.classes == 'first_half' and recipe.method == 'softmax' and recipe.dim == 0:
        # What runs with --start-from begin with. Not kept in the repository: this run makes it anew.
        torch.save({name: value for name, value in run.model.state_dict().items() if not name.startswith('fc.')},
                   folder / f'{recipe.name()}.pt')
    os.replace(part, path)
    checkpoint.unlink(missing_ok=True)
    return record
