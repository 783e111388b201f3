"""The model of a checkpoint, a folder or the Hub; and the embeddings that it makes of batches."""
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn

from ..head import heads_of
from ..head.numerics import unit_embeddings
from ..models import load_model
from ..timm_scripts.conversion import load_wrapped

__all__ = ['digest_of', 'embed_batches', 'load_any']


def load_any(
        source: str,
        device: torch.device,
        *,
        model: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        use_ema: bool = False,
) -> nn.Module:
    """Load a DL2PA model, in evaluation mode.

    Args:
        source: A checkpoint of timm's train.py, a state dict, a folder of `save_model`, or 'hf-hub:user/model'.
        device: Where the model goes.
        model: The backbone of a checkpoint that does not name it.
        model_kwargs: Arguments of the backbone and dl2pa_... options that a checkpoint lacks.
        use_ema: Whether to load the averaged weights of a checkpoint.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is no DL2PA model, or options were given that are for checkpoints alone.
        OSError: The Hub cannot be reached, or the file cannot be read.
    """
    if not source.startswith(('hf-hub:', 'local-dir:')):
        return load_wrapped(source, model=model, model_kwargs=model_kwargs, use_ema=use_ema)[0].to(device).eval()
    if model or model_kwargs or use_ema:
        raise ValueError(f'--model, --model-kwargs and --use-ema are for checkpoints: {source} says itself what it '
                         f'is.')
    return load_model(source, device)


def digest_of(model: nn.Module) -> str:
    """Return a digest of all tensors of a model with their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


@torch.no_grad()
def embed_batches(model: nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], device: torch.device
                  ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the unit embeddings of batches of images, by the main head of a model, and their labels.

    Where the head works on maps, whose logits the model averages, the embedding is the mean direction over the places.

    Args:
        model: The model, which is put in evaluation mode.
        batches: Images (B, ...) with labels (B,).
        device: The device of the model.

    Yields:
        Embeddings (B, d) float32 and labels (B,), on the CPU.

    Raises:
        ValueError: An embedding is not finite.
    """
    head, model = heads_of(model)[0], model.eval()
    heard: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, inputs: heard.append(module.embed(inputs[0])))
    try:
        for images, labels in batches:
            heard.clear()
            model(images.to(device, non_blocking=True))
            embeddings = heard[0].flatten(2).mean(dim=2) if head.channels_first else heard[0]
            if embeddings.ndim > 2:
                embeddings = embeddings.flatten(1, -2).mean(dim=1)
            embeddings = unit_embeddings(embeddings).cpu()
            bad = int((~embeddings.isfinite().all(dim=1)).sum())
            if bad:
                raise ValueError(f'{bad} of {len(embeddings)} embeddings of a batch are not finite: the model, or an '
                                 f'image, is damaged.')
            yield embeddings, labels
    finally:
        hook.remove()
