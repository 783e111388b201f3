"""Checkpoints with random faults: only documented errors come out, nothing is executed, and nothing has no end.

A failure leaves the file.
"""
import argparse
import io
import math
import os
import pickle
import signal
import struct
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save

from tests.fuzz.harness import search
from tests.helpers.stand_in import make_model
from timm_dl2pa import AssignmentUpdate
from timm_dl2pa.timm_scripts import plugged_in
from timm_dl2pa.timm_scripts.conversion import load_wrapped
from timm_dl2pa.timm_scripts.inspection import inspect_checkpoint
from timm_dl2pa.timm_scripts.record import class_means_of, metrics_of, read_training

pytestmark = [pytest.mark.timm, pytest.mark.slow, pytest.mark.filterwarnings('ignore')]

LIMIT = 20  # seconds of the processor that one file may take
UPDATE = asdict(AssignmentUpdate(step=4, epoch=1, moved=2, objective_before=1.0, objective=2.0, seconds=0.1))


class TooLong(BaseException):
    """One file took more than the limit; no handler of the package's takes it for an error of the file."""


@contextmanager
def limited():
    def stop(*_):
        raise TooLong(f'more than {LIMIT} s')

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)  # a loaded machine may stop a process for as long
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def little_memory(gibibytes=6):
    """A file of some hundred kilobytes must not ask for all of the machine's memory."""
    resource = pytest.importorskip('resource')
    with open('/proc/self/statm') as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + gibibytes * 2 ** 30, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a file in each way that the commands do."""
    started = []
    for name in ('os.system', 'subprocess.Popen', 'os.execv', 'os.posix_spawn'):
        monkeypatch.setattr(name, lambda *arguments, **_: started.append(arguments))
    ways = [
        lambda path: list(inspect_checkpoint(path)),
        lambda path: load_wrapped(path, model='test_resnet'),
        lambda path: load_wrapped(path, use_ema=True),
        record_of,
    ]

    def read(path):
        for way in ways:
            with suppress(ValueError, OSError), limited():
                way(path)
        assert not started and not (tmp_path / 'executed').exists(), 'the file was executed'

    with little_memory():
        yield read


def record_of(path):
    from timm_dl2pa.timm_scripts.checkpoint import read_checkpoint
    checkpoint = read_checkpoint(path)
    class_means_of(checkpoint)
    metrics_of(read_training(checkpoint), checkpoint, use_ema=False)


def search_files(tmp_path, read, make, suffix):
    """Read files that `make(random)` returns, until the time is over."""
    path = tmp_path / f'case{suffix}'

    def try_one(rng):
        path.write_bytes(make(rng))
        read(path)

    assert search(try_one) > 3


class Executed:
    """What a pickle that runs code does."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def good_checkpoint():
    with plugged_in():
        state = dict(make_model(dl2pa_dim=3).state_dict())
    scheduler = {'clock': {'batches': 4, 'epochs': 1, 'epoch_began': 4, 'epoch_length': 4, 'settled_batch': 0,
                           'settled_epoch': 0}, 'due': False,
                 'resolver': {'history': [dict(UPDATE)]},
                 'class_means': {'sums': torch.ones(5, 3)}}
    args = argparse.Namespace(model='test_resnet', model_kwargs={'dl2pa_dim': 3}, eval_metric='top1', epochs=3, lr=0.1)
    return {'state_dict': state, 'state_dict_ema': dict(state), 'epoch': 1, 'metric': 50.0, 'args': args,
            'task_state': {'dl2pa': {'options': {'dim': 3}, 'batches': 0, 'scheduler': scheduler}}}


def saved(checkpoint, **kwargs):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer, **kwargs)
    return buffer.getvalue()


def damaged(content, rng):
    """Bytes with a few faults."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        if not content:
            break
        # Faults near the beginning and the end meet headers and directories.
        at = rng.choice([rng.randrange(len(content)), rng.randrange(min(len(content), 400)),
                         len(content) - 1 - rng.randrange(min(len(content), 400))])
        fault = rng.randrange(6)
        if fault == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif fault == 1:
            content[at] = rng.choice([0, 1, 0x7f, 0x80, 0xff, rng.randrange(256)])
        elif fault == 2:
            content[at:at + 8] = struct.pack('<Q', rng.choice([0, 1, 2 ** 31, 2 ** 40, 2 ** 63, 2 ** 64 - 1]))
        elif fault == 3:
            del content[at:at + rng.choice([1, 2, 100])]
        elif fault == 4:
            content[at:at] = content[at:at + rng.choice([1, 4, 60])]
        elif rng.random() < 0.2:
            del content[at:]
    return bytes(content)


def with_pickle(content, change):
    """A file of `torch.save` whose pickle is changed, with the right checksums: nothing else stops what is in it."""
    source, buffer = zipfile.ZipFile(io.BytesIO(content)), io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as target:
        for name in source.namelist():
            part = source.read(name)
            target.writestr(name, change(part) if name.endswith('data.pkl') else part)
    return buffer.getvalue()


def strange(rng, tmp_path):
    """A value that is nowhere expected."""
    nested = [1]
    for _ in range(30):
        nested = [nested, nested]
    circle = []
    circle.append(circle)
    return rng.choice([
        None, True, -1, 0, 2 ** 70, 10 ** 5000, 1e308, math.nan, -math.inf, '', 'x' * 1000, '\x1b[2J\n', '\udc80',
        b'\0', [], {}, (), set(), nested, circle, {'x': nested}, {1: 2}, [dict(UPDATE)] * 3, argparse.Namespace(x=1),
        torch.tensor(0.5), torch.zeros(0), torch.ones(5, 3), torch.arange(5), torch.full((5,), math.nan),
        torch.ones(1).expand(2 ** 40), torch.ones(1).expand(2 ** 20, 2 ** 20), torch.eye(3).to_sparse(),
        torch.ones(5, 3, dtype=torch.complex64), torch.ones(5, dtype=torch.uint8), torch.ones(3).bool(),
        torch.ones(5, 3).to(torch.float8_e4m3fn), torch.ones(5, 3, device='meta'), torch.nn.Parameter(torch.ones(5)),
        'hf-hub:user/model', 'local-dir:/', '/etc/passwd', 'dl2pa', 'resnet18', Executed(tmp_path / 'executed'),
    ])


def changed(value, rng, tmp_path, depth=0):
    """A copy of a tree with one entry in it replaced, removed or renamed."""
    entries = vars(value) if isinstance(value, argparse.Namespace) else value
    if not isinstance(entries, (dict, list)) or not entries or (depth and rng.random() < 0.15):
        return strange(rng, tmp_path)
    entries = entries.copy()
    keys = list(entries) if isinstance(entries, dict) else list(range(len(entries)))
    heads = [key for key in keys if str(key).startswith('fc.')]
    key = rng.choice(heads if heads and rng.random() < 0.8 else keys)
    fate = rng.random()
    if fate < 0.1:
        del entries[key]
    elif fate < 0.2 and isinstance(entries, dict):
        names = ['x', '', 'checkpoint_path', 'pretrained', 'depth', 'dl2pa_neck', 'img_size', 'dl2pa_backbone']
        entries[rng.choice(names)] = strange(rng, tmp_path)
    else:
        entries[key] = changed(entries[key], rng, tmp_path, depth + 1)
    return argparse.Namespace(**entries) if isinstance(value, argparse.Namespace) else entries


def test_trees_with_strange_entries(tmp_path, read):
    good = good_checkpoint()

    def make(rng):
        while True:
            checkpoint = good
            for _ in range(rng.choice([1, 1, 1, 2, 4])):
                checkpoint = changed(checkpoint, rng, tmp_path)
            with suppress(pickle.PicklingError, RuntimeError, RecursionError, UnicodeEncodeError):
                return saved(checkpoint)

    search_files(tmp_path, read, make, '.pth.tar')


@pytest.mark.parametrize('new_format', [True, False], ids=['zip', 'legacy'])
def test_damaged_pickles(tmp_path, read, new_format):
    good = saved(good_checkpoint(), _use_new_zipfile_serialization=new_format)

    def make(rng):
        if new_format and rng.random() < 0.7:
            return with_pickle(good, lambda part: damaged(part, rng))
        return damaged(good, rng)

    search_files(tmp_path, read, make, '.pth.tar')


def test_damaged_safetensors(tmp_path, read):
    good = save({name: value.contiguous() for name, value in good_checkpoint()['state_dict'].items()})
    search_files(tmp_path, read, lambda rng: damaged(good, rng), '.safetensors')


def test_noise(tmp_path, read):
    beginnings = [b'', b'PK\x03\x04', b'\x80\x02}q\x00', b'\x80\x04\x95', b'{"a":', struct.pack('<Q', 40) + b'{"x":{']
    search_files(tmp_path, read, lambda rng: rng.choice(beginnings) + rng.randbytes(rng.choice([0, 10, 1000])), '.pth')
