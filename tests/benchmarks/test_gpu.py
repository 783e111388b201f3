"""The GPU's benchmark on a machine without one: what it would run, that it runs, that nothing is lost on the way."""
import io
import json
import os
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.helpers.processes import run

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import gpu_steps
import image_arrays
import readme_tables
from accuracy_recipe import SIZES, Recipe
from gpu_pack import pack, unpack
from gpu_sharing import shared_gpu
from gpu_work import Work
from pack_tiny_imagenet import pack_tiny_imagenet
from partial_fc import PartialFC

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


def steps(seconds=500.0, epoch=None):
    return gpu_steps.all_steps('cuda', seconds=seconds, parallel=4, epoch=epoch, dry_run=False)


def test_the_steps_are_those_asked_for_the_most_telling_first():
    found = steps()
    assert list(dict.fromkeys(step.kind for step in found)) == list(gpu_steps.KINDS)
    assert len({step.name for step in found}) == len(found)
    cifar = [step for step in found if step.kind == 'cifar']
    # Three schedules, three dimensions, eight methods.
    assert len(cifar) == 72 and all(step.needs == 'arrays' and not step.alone for step in cifar)
    assert len([step for step in found if step.kind == 'tiny_imagenet']) == 24
    assert all('distiller_100' in step.arguments for step in cifar[:24])
    # Where the long schedule fits, the short one is not run.
    assert not any('distiller_100' in step.arguments for step in steps(epoch=0.5) if step.kind == 'cifar')
    assert next(step for step in found if step.kind == 'tests').limit <= 120


def script(folder, name, text):
    (folder / name).write_text(text)
    return gpu_steps.Step(name, 'cifar', str(folder / name), (), f'{name}.json', least=0.1, limit=60)


def test_steps_run_fail_are_cut_and_go_on(tmp_path, capfd):
    """Toy scripts in the steps' place: the order, the limits, and what is said of each."""
    write = "import sys, pathlib, time\nfolder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
    done = script(tmp_path, 'works.py', write + "(folder / 'works.py.json').write_text('{}')")
    failing = script(tmp_path, 'fails.py', "print('all is well'); raise ValueError('no such option')")
    hanging = replace(script(tmp_path, 'hangs.py', 'import time; time.sleep(600)'), limit=1.0)
    missing = replace(done, name='missing', needs='tiny_imagenet', record='missing.json')
    late = replace(done, name='late', least=10.0 ** 6, record='late.json')
    cut = replace(script(tmp_path, 'cut.py', 'import sys; assert "--until" in sys.argv; sys.exit(3)'), training=True,
                  alone=False)
    after = replace(done, name='after', record='after.json')
    work = Work(tmp_path / 'out', 60.0, 2, {})
    began = time.monotonic()
    work.run([done, failing, hanging, missing, late, cut, after], tmp_path / 'out')
    lines = {line.split('] ')[1].split(': ')[0]: line for line in capfd.readouterr().out.splitlines()}
    assert 'done in' in lines['works.py'] and 'done in' in lines['after']
    assert 'failed with status 1' in lines['fails.py'] and lines['fails.py'].endswith('ValueError: no such option')
    assert 'ended after' in lines['hangs.py']
    assert 'skipped' in lines['missing'] and '--tiny-imagenet' in lines['missing']
    assert 'not begun' in lines['late'] and 'goes on from its checkpoint' in lines['cut.py']
    assert work.failed == ['fails.py', 'hangs.py'] and time.monotonic() - began < 45
    # What is there is not run again.
    work.run([done], tmp_path / 'out')
    assert 'there already' in capfd.readouterr().out


def test_trainings_run_side_by_side_and_others_alone(tmp_path):
    record = ("import sys, pathlib, time\nfile = pathlib.Path(sys.argv[0] + '.times')\n"
              "began = time.time(); time.sleep(2); file.write_text(f'{began} {time.time()}')")
    beside = [replace(script(tmp_path, f'beside{number}', record), alone=False) for number in range(2)]
    Work(tmp_path / 'out', 60.0, 2, {}).run([*beside, script(tmp_path, 'alone', record)], tmp_path / 'out')
    times = [tuple(map(float, (tmp_path / f'{name}.times').read_text().split()))
             for name in ('beside0', 'beside1', 'alone')]
    assert times[0][0] < times[1][1] and times[1][0] < times[0][1]
    assert times[2][0] > max(times[0][1], times[1][1])


def test_what_was_packed_is_unpacked(tmp_path):
    out, results, next_run = tmp_path / 'out', tmp_path / 'results', tmp_path / 'next'
    (out / 'accuracy').mkdir(parents=True)
    (out / 'logs').mkdir()
    (out / 'logs' / 'a.log').write_text('text')
    (out / 'head_step_cuda.json').write_text('{"results": 1}')
    (out / 'accuracy' / 'softmax_lr=0.1.json').write_text('{}')
    for name in 'abcd':
        (out / 'accuracy' / f'{name}.ckpt').write_bytes(name.encode() * 100_000)
    left = pack(out, tmp_path / 'packed', largest=250_000, most=2)
    files = sorted((tmp_path / 'packed').iterdir())
    assert [file.name for file in files] == ['checkpoints-0.tar', 'results.tar']
    assert len(left) == 2 and files[0].stat().st_size <= 250_000
    assert not pack(out, tmp_path / 'packed', largest=250_000, most=3)
    files = sorted((tmp_path / 'packed').iterdir())
    assert len(files) == 3 and all(file.stat().st_size <= 250_000 for file in files)
    (results / 'accuracy').mkdir(parents=True)
    (results / 'accuracy' / 'a.json').write_text('{}')  # was finished elsewhere
    unpack(files, results, next_run)
    assert json.loads((results / 'head_step_cuda.json').read_text()) == {'results': 1}
    assert (results / 'accuracy' / 'softmax_lr=0.1.json').exists() and not (results / 'logs').exists()
    assert sorted(file.name for file in (next_run / 'accuracy').iterdir()) == ['b.ckpt', 'c.ckpt', 'd.ckpt']
    assert (next_run / 'accuracy' / 'b.ckpt').read_bytes() == b'b' * 100_000
    # Fewer checkpoints: the file that is too many goes.
    for name in 'bcd':
        (out / 'accuracy' / f'{name}.ckpt').unlink()
    pack(out, tmp_path / 'packed', largest=250_000, most=3)
    assert sorted(file.name for file in (tmp_path / 'packed').iterdir()) == ['checkpoints-0.tar', 'results.tar']


@pytest.mark.parametrize('name', ['../outside.json', 'a/b/c.json', 'script.py'])
def test_unpacking_refuses_what_packing_does_not_write(tmp_path, name):
    with tarfile.open(tmp_path / 'bad.tar', 'w') as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match='is not of this benchmark'):
        unpack([tmp_path / 'bad.tar'], tmp_path / 'results', tmp_path / 'results')
    assert not (tmp_path / 'results').exists() and not (tmp_path / 'outside.json').exists()


def test_partial_fc_is_a_softmax_over_the_batchs_classes_and_a_sample_of_the_others():
    torch.manual_seed(0)
    labels = torch.tensor([3, 17, 3, 99])
    layer = PartialFC(100, 8, share=0.1)
    classes, places = layer.sample(labels)
    assert len(set(classes.tolist())) == 10 and torch.equal(classes[places], labels)
    assert {tuple(layer.sample(labels)[0].tolist()) for _ in range(3)} != {tuple(classes.tolist())}
    # More classes in the batch than the sample is to have.
    assert torch.equal(PartialFC(100, 8, share=0.02).sample(labels)[0], torch.tensor([3, 17, 99]))

    layer = PartialFC(100, 8, share=1.0, scale=4.0, lr=0.1)
    centres = layer.centres.clone().requires_grad_()
    embeddings = torch.randn(4, 8)
    expected = F.cross_entropy(4 * F.normalize(embeddings) @ F.normalize(centres).t(), labels)
    optimizer = torch.optim.SGD([centres], lr=0.1, momentum=0.9, weight_decay=1e-4)
    for _ in range(2):
        loss = layer.loss(embeddings, labels)
        loss.backward()
        layer.step()
        optimizer.zero_grad()
        expected = F.cross_entropy(4 * F.normalize(embeddings) @ F.normalize(centres).t(), labels)
        expected.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(layer.centres, centres, atol=1e-6)

    layer = PartialFC(100, 8, share=0.1)
    before = layer.centres.clone()
    layer.loss(embeddings, labels).backward()
    layer.step()
    moved = (layer.centres != before).any(dim=1)
    assert moved.sum() == 10 and moved[labels].all()


def test_tiny_imagenet_is_packed_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    generator = np.random.default_rng(0)
    source, classes = tmp_path / 'tiny-imagenet-200', ('n02', 'n01', 'n03')

    def jpeg(path, brightness):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(brightness + generator.integers(-20, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=95)

    lines = []
    for number, name in enumerate(classes):
        for index in range(20):
            jpeg(source / 'train' / name / 'images' / f'{name}_{index}.JPEG', 60 + 60 * number)
        jpeg(source / 'val' / 'images' / f'val_{number}.JPEG', 60 + 60 * number)
        lines.append(f'val_{number}.JPEG\t{name}\t0\t0\t15\t15\n')
    (source / 'val' / 'val_annotations.txt').write_text(''.join(lines))
    files = pack_tiny_imagenet(source, tmp_path / 'arrays', largest=85_000)
    assert len(files) > 2 and files[-1].name == 'test.npz'
    assert all(file.stat().st_size <= 85_000 for file in files)
    images = image_arrays.load_images(arrays=str(tmp_path / 'arrays'))
    assert images.classes == ('n01', 'n02', 'n03') and images.x_train.shape == (60, 3, 16, 16)
    assert images.y_test.tolist() == [1, 0, 2]
    # Each image has the brightness of its class.
    expected = torch.tensor([120.0, 60.0, 180.0])
    for x, y in ((images.x_train, images.y_train), (images.x_test, images.y_test)):
        assert torch.allclose(x.float().mean(dim=(1, 2, 3)), expected[y], atol=5)
    (source / 'val' / 'val_annotations.txt').write_text('val_0.JPEG\tn09\t0\t0\t1\t1\n')
    with pytest.raises(ValueError, match='the class n09, of which there is no training image'):
        pack_tiny_imagenet(source, tmp_path / 'arrays')


def test_the_tables_have_a_gpus_figures_or_say_that_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, 'RESULTS', tmp_path)
    assert readme_tables.gpu() == readme_tables.NOT_YET
    machine = {'gpu': 'Some Card', 'driver': '1.2', 'torch': '3.4'}

    def write(name, rows, **record):
        path = tmp_path / f'{name}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({'environment': machine, 'results': rows, **record}))

    write('head_step_cuda', [{'num_classes': 1000, 'dim': 8, 'neck_ms': 1.5, 'neck_mb': 1234,
                              'linear_failed': 'out of memory'}])
    write('assignment_cuda', [{'num_classes': 21841, 'dim': 8, 'case': 'cold', 'ours seconds': 3.0,
                               'ours on cuda seconds': 1.5}])
    write('train_step_compiled_cuda', [{
        'model': 'resnet50', 'num_classes': 1000, 'dim': 8, 'compiled': True, 'linear_ms': 10.0,
        'linear_images_a_second': 2560.0, 'squared_cosine_ms': 11.0, 'squared_cosine_images_a_second': 2327.3,
        'squared_cosine_over_linear': 1.1}])
    for name, gpu in (('a', 'Some Card'), ('b', None)):
        machine['gpu'] = gpu
        recipe = {**asdict(Recipe(**SIZES['distiller'], method='softmax')), 'seed': 3}
        write(f'accuracy/{name}', {'top1': 71.25 if gpu else 12.0, 'top5': 90.0, 'calibration_error': 1.0,
                                   'angular_separation': {'smallest': 60.0}, 'recall_at_1': 50.0}, recipe=recipe)
    assert '| the neck alone | 1.50 ms, 1,234 MB |' in readme_tables.head_step_gpu()
    assert '| `nn.Linear`, cross-entropy | out of memory |' in readme_tables.head_step_gpu()
    assert 'Some Card, driver 1.2, PyTorch 3.4' in readme_tables.head_step_gpu()
    assert '| 21,841, 8 | cold | 3.00 s | 1.50 s | 2x |' in readme_tables.assignment_gpu()
    assert '| resnet50, 1,000, 8, compiled | 2,560 | failed | 2,327 | - | 1.100 |' in readme_tables.train_step_gpu()
    accuracy = readme_tables.accuracy_gpu()
    # The run on the CPU is none of these.
    assert "| RepDistiller's, 240 epochs |" in accuracy and '71.25' in accuracy and '41.6' not in accuracy
    assert readme_tables.tiny_imagenet_gpu() == readme_tables.NOT_YET == readme_tables.prototypes_gpu()
    together = readme_tables.gpu()
    assert accuracy in together and readme_tables.NOT_YET not in together
    assert '**Prototypes by descent**' not in together


@pytest.mark.slow
def test_the_dry_run_does_every_step(tmp_path):
    command = [sys.executable, str(BENCHMARKS / 'gpu.py'), '--dry-run', '--minutes', '9', '--parallel', '2', '--output',
               str(tmp_path / 'out'), '--pack', str(tmp_path / 'packed')]
    done = run(command, limit=600)
    toys = gpu_steps.all_steps('cpu', seconds=1.0, parallel=2, epoch=None, dry_run=True)
    assert {step.kind for step in toys} == set(gpu_steps.KINDS) and all(step.done(tmp_path / 'out') for step in toys)
    assert done.stdout.count(': done in') == len(toys)
    for step in toys:
        record = json.loads((tmp_path / 'out' / step.folder / step.record).read_text())
        assert record['command'].startswith(f'python benchmarks/{step.script} ') and str(tmp_path) not in str(record)
        assert {'gpu', 'driver', 'cuda', 'torch', 'commit'} <= set(record['environment'])
    unpack([tmp_path / 'packed' / 'results.tar'], tmp_path / 'results', tmp_path / 'results')
    assert all(step.done(tmp_path / 'results') for step in toys)


def test_without_a_device_mps_is_ended_again(tmp_path, monkeypatch):
    """By a control program that writes down what it is told. No process finds a device through it."""
    control = tmp_path / 'nvidia-cuda-mps-control'
    control.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n[ "$1" = -d ] || cat >> {tmp_path}/told\n')
    control.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')
    with shared_gpu() as variables:
        assert variables == {}
        assert (tmp_path / 'told').read_text().split() == ['-d']
    assert (tmp_path / 'told').read_text().split() == ['-d', 'quit']
