"""Sharded training, two processes on the CPU: FSDP1 and FSDP2 do what DistributedDataParallel does."""
import copy
import warnings

import pytest
import torch
import torch.nn as nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.processes import run_ranks
from timm_dl2pa import AssignmentScheduler, DL2PAHead, prime

try:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
except ImportError:  # before torch 2.6
    fully_shard = None

STEPS, CLASSES = 12, 5
FULL = StateDictOptions(full_state_dict=True)


def new_model(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), DL2PAHead(16, CLASSES, 3, **options))


def batch(rank, step):
    generator = torch.Generator().manual_seed(100 * rank + step)
    labels = torch.randint(0, CLASSES, (12,), generator=generator)
    corners = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(99))
    return corners[labels] + 0.3 * torch.randn(12, 6, generator=generator), labels


def train(model, rank):
    """Train through a warm-up and a re-solve; return what the scheduler did."""
    scheduler = AssignmentScheduler(model, interval=2, warmup_length=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        x, labels = batch(rank, step)
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(labels)
    return [(update.step, update.event, update.moved) for update in scheduler.history]


def shard(model, way):
    if way.startswith('fsdp2'):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if way == 'fsdp2_bfloat16' else None)
        mesh = init_device_mesh('cpu', (2,))
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
        return model
    casts = {'fsdp1_buffers': MixedPrecision(buffer_dtype=torch.bfloat16),
             'fsdp1_flat_bfloat16': MixedPrecision(torch.bfloat16, torch.bfloat16),
             'fsdp1_bfloat16': MixedPrecision(torch.bfloat16, torch.bfloat16, torch.bfloat16)}.get(way)
    if way == 'fsdp1':
        model[2] = FullyShardedDataParallel(model[2], device_id=torch.device('cpu'), use_orig_params=True)
    return FullyShardedDataParallel(model, device_id=torch.device('cpu'), mixed_precision=casts,
                                    use_orig_params='flat' not in way)


def in_process(rank, folder, way, options):
    plain = new_model(**options)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)  # of broadcast_buffers, which later versions call otherwise
        expected = train(DistributedDataParallel(plain, broadcast_buffers=False), rank)
    model = shard(new_model(**options), way)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        history = train(model, rank)
    state = get_model_state_dict(model, options=FULL)
    refused = None
    try:
        prime(model, [batch(rank, 0)], progress=False)
    except ValueError as error:
        refused = str(error)
    model.eval()
    logits = model(batch(0, 0)[0]).detach()
    # A full state dict goes back into a sharded model.
    again = shard(new_model(**options), way)
    set_model_state_dict(again, copy.deepcopy(state), options=FULL)
    again.eval()
    torch.save(dict(history=history, expected=expected, state=state, plain=plain.state_dict(), logits=logits,
                    again=again(batch(0, 0)[0]).detach(), refused=refused,
                    told=[str(warning.message) for warning in told]), f'{folder}/{rank}.pt')


@pytest.mark.slow
@pytest.mark.parametrize('way, recipe', [
    *((way, recipe) for way in ('fsdp2', 'fsdp1_buffers') for recipe in ('placed', 'even', 'paper')),
    *((way, 'placed') for way in ('fsdp2_bfloat16', 'fsdp1', 'fsdp1_flat', 'fsdp1_flat_bfloat16', 'fsdp1_bfloat16'))])
def test_sharded_training_is_that_of_ddp(tmp_path, way, recipe):
    if way.startswith('fsdp2') and fully_shard is None:
        pytest.skip('FSDP2 is public since torch 2.6')
    options = {'recipe': recipe}
    run_ranks(in_process, str(tmp_path), way, options, folder=tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pt')
        rounded = way.endswith(('bfloat16', 'buffers'))
        assert [entry[:2] for entry in found['history']] == [entry[:2] for entry in found['expected']]
        assert rounded or found['history'] == found['expected']
        assert 'call it before' in found['refused']
        assert any('buffer_dtype' in text for text in found['told']) == (way in ('fsdp1_buffers', 'fsdp1_bfloat16'))
        model = new_model(**options)
        model.load_state_dict(found['state'])
        assert model[2].prototypes.dtype == torch.float32
        x, _ = batch(0, 0)
        assert torch.allclose(model.eval()(x), found['logits'], atol=0.1 if rounded else 1e-4)
        assert torch.allclose(found['again'], found['logits'], atol=0.1 if rounded else 1e-4)
        for name, value in found['plain'].items():
            assert torch.allclose(found['state'][name], value, atol=0.2 if rounded else 1e-4), name
