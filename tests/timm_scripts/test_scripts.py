"""timm's own, unmodified scripts with the plugin. They are found by the environment variable TIMM_REPO."""
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import timm_dl2pa
from tests.helpers import processes

REPO = os.environ.get('TIMM_REPO')
pytestmark = [
    pytest.mark.timm,
    pytest.mark.slow,
    pytest.mark.skipif(not REPO, reason="TIMM_REPO names no checkout of timm's repository, whose scripts are run here"),
]

CLASSES = 5
SIZE = ['--input-size', '3', '32', '32']
PLUGIN = ['--device-modules', 'timm_dl2pa.plugin']


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """An ImageFolder: five classes that can be told apart, 12 training and 6 validation images each."""
    from PIL import Image
    root = tmp_path_factory.mktemp('images')
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(CLASSES, 3, 4, 4, generator=generator)
    for split, count in (('train', 12), ('validation', 6)):
        for label in range(CLASSES):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for index in range(count):
                image = patterns[label].repeat_interleave(8, 1).repeat_interleave(8, 2)
                image = (image + 0.2 * torch.randn(3, 32, 32, generator=generator)).clamp(0, 1)
                Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(folder / f'{label}-{index}.png')
    return root


def run(command, fails=False, **environment):
    # The scripts are run with the package that is tested, and with their own timm.
    path = os.pathsep.join([REPO, str(Path(timm_dl2pa.__file__).parents[1]), str(Path(__file__).parent / 'modules')])
    environment = {'PYTHONPATH': path, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', **environment}
    return processes.run(command, fails=fails, environment=environment, stderr=subprocess.STDOUT).stdout


class Training:
    """One folder for the runs of a test; `train` returns what the script printed."""

    def __init__(self, data, folder):
        self.data, self.folder = data, folder

    def command(self, name, *flags, dim=3, plugin=True, processes=1, model='test_resnet', options=(), kwargs=(),
                epochs=3):
        if dim:
            # So that re-solves come: nine tenths of three epochs leave no whole epoch.
            if not any(option.startswith('warmup') for option in options):
                options = [*options, "warmup_length='1 epoch'"]
            kwargs = [*kwargs, f'dl2pa_dim={dim}', *(f'dl2pa_{option}' for option in options)]
        launcher = [sys.executable]
        if processes > 1:
            launcher += ['-m', 'torch.distributed.run', '--nproc-per-node', str(processes), '--master-port', '0',
                         '--standalone']
        return [*launcher, f'{REPO}/train.py', '--data-dir', str(self.data), '--model', model,
                '--num-classes', str(CLASSES), *SIZE, '-b', '8', '--epochs', str(epochs), '--device', 'cpu', '-j', '1',
                '--lr', '0.05', '--warmup-epochs', '0', '--output', str(self.folder), '--experiment', name,
                *(PLUGIN if plugin else []), *flags, *(['--model-kwargs', *kwargs] if kwargs else [])]

    def train(self, name, *flags, fails=False, kill_after=None, **options):
        if kill_after is None:
            return run(self.command(name, *flags, **options), fails)
        command = self.command(name, *flags, plugin=False, **options)
        return run([*command, *PLUGIN, 'kill_in_training'], fails=True, KILL_AFTER=str(kill_after))

    def file(self, name, file):
        return self.folder / name / file

    def checkpoint(self, name, file='last.pth.tar'):
        return torch.load(self.file(name, file), weights_only=False)

    def summary(self, name):
        with open(self.file(name, 'summary.csv')) as file:
            return list(csv.DictReader(file))

    def losses(self, name):
        return [row['train_loss'] for row in self.summary(name)]

    def record(self, name):
        with open(self.file(name, 'dl2pa.csv')) as file:
            return list(csv.DictReader(file))


@pytest.fixture
def training(data, tmp_path):
    return Training(data, tmp_path)


def assert_same_state(ours, theirs):
    """All tensors equal bit for bit, and all plain values, but for the seconds that re-solves took."""
    assert type(ours) is type(theirs) or isinstance(ours, (int, float))
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {'seconds', 'args', 'saver'}:
            assert_same_state(ours[key], theirs[key])
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs):
            assert_same_state(one, other)
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


def test_both_ways_in_are_one(training):
    said = training.train('plugin', options=['interval=4'])
    assert re.search(r'DL2PA: .*K=5 .*d=3 .*loss criterion .*every 4 batches, exactly', said)
    assert len(re.findall(r'DL2PA: after epoch .* labels moved, objective per class .* -> ', said)) == 4
    assert len(training.record('plugin')) == 4
    assert training.summary('plugin')[-1]['train_dl2pa_resolves'] == '3'  # and the end of the warm-up
    command = training.command('run', plugin=False, dim=None)
    run([sys.executable, '-m', 'timm_dl2pa', 'run', '--dl2pa-dim', '3', *command[1:], '--dl2pa-interval=4',
         '--dl2pa-warmup-length', '1 epoch'])
    assert training.losses('run') == training.losses('plugin')
    assert_same_state(training.checkpoint('run')['state_dict'], training.checkpoint('plugin')['state_dict'])
    for name in ('run', 'plugin'):
        arguments = yaml.safe_load(training.file(name, 'args.yaml').read_text())
        assert arguments['model_kwargs'] == {
            'dl2pa_dim': 3, 'dl2pa_interval': 4, 'dl2pa_warmup_length': '1 epoch'}
        assert training.checkpoint(name)['args'].model_kwargs == arguments['model_kwargs']
    config = training.folder / 'config.yaml'
    config.write_text('model_kwargs:\n  dl2pa_interval: 4\n  dl2pa_dim: 4\n  dl2pa_warmup_length: 1 epoch\n')
    training.train('config', '--config', str(config), dim=None)
    assert training.checkpoint('config')['state_dict']['fc.prototypes'].shape == (5, 4)
    command = training.command('both', '--config', str(config), plugin=False, dim=None)
    run([sys.executable, '-m', 'timm_dl2pa', 'run', '--dl2pa-dim', '3', *command[1:]])
    assert training.losses('both') == training.losses('plugin')


def test_without_options_nothing_changes(training):
    training.train('with', dim=None)
    training.train('without', dim=None, plugin=False)
    assert training.losses('with') == training.losses('without')
    assert training.summary('with')[0].keys() == training.summary('without')[0].keys()
    ours, theirs = training.checkpoint('with'), training.checkpoint('without')
    assert ours.keys() == theirs.keys() and not training.file('with', 'dl2pa.csv').exists()
    assert_same_state(ours['state_dict'], theirs['state_dict'])


OFFERS = {
    'no smoothing': ['--smoothing', '0'],
    'mixup': ['--mixup', '0.8', '--cutmix', '1', '--mixup-off-epoch', '2'],
    'mixup without prefetcher': ['--mixup', '0.8', '--no-prefetcher'],
    'bce': ['--bce-loss'],
    'bce with mixup': ['--bce-loss', '--mixup', '0.8'],
    'jsd': ['--jsd-loss', '--aug-splits', '3', '--aa', 'rand-m3'],
    'split-bn': ['--aug-splits', '2', '--split-bn', 'neck=linear_bn'],
    'squared cosine': ['loss=squared_cosine'],
    'dot regression': ['loss=dot_regression'],
    'sampled cross-entropy': ['loss=sampled_cross_entropy', 'num_sampled=2'],
    'squared cosine with mixup': ['loss=squared_cosine', '--mixup', '0.8'],
    'dot regression with cutmix': ['loss=dot_regression', '--cutmix', '1'],
    'float16': ['--amp', '--amp-dtype', 'float16'],
    'bfloat16': ['--amp', '--amp-dtype', 'bfloat16', 'loss=squared_cosine'],
    'bfloat16 model': ['--model-dtype', 'bfloat16'],
    'channels last': ['--channels-last'],
    'accumulation': ['--grad-accum-steps', '3'],
    'clip norm': ['--clip-grad', '1', '--clip-mode', 'norm'],
    'clip value': ['--clip-grad', '1', '--clip-mode', 'value'],
    'agc': ['--clip-grad', '0.01', '--clip-mode', 'agc'],
    'layer decay': ['--layer-decay', '0.7', '--opt', 'adamw'],
    'compile': ['--torchcompile', 'eager'],
    'ema': ['--model-ema', '--model-ema-decay', '0.9'],
    'ema and compile': ['--model-ema', '--torchcompile', 'eager', 'loss=squared_cosine'],
    'learned scale': ['learn_scale=True'],
    'spare prototypes': ['num_prototypes=8'],
    'no validation': ['--val-split', ''],
    'rare validation': ['--val-interval', '2'],
}


@pytest.mark.parametrize('offer', OFFERS)
def test_what_train_offers(training, offer):
    words = OFFERS[offer]
    options = [word for word in words if re.match(r'[a-z_]+=', word)]
    said = training.train('run', *(word for word in words if word not in options), options=options)
    record, checkpoint = training.record('run'), training.checkpoint('run')
    assert [row['epoch'] for row in record] == ['1', '2'], said[-3000:]
    assert all(float(row['objective']) >= float(row['objective_before']) - 1e-9 for row in record)
    assert checkpoint['task_state']['dl2pa']['scheduler']['clock']['epochs'] == 2
    assignment = checkpoint['state_dict']['fc.assignment']
    assert len(assignment.unique()) == CLASSES
    if 'ema' in offer:
        assert torch.equal(checkpoint['state_dict_ema']['fc.assignment'], assignment)
    if offer == 'split-bn':
        assert 'fc.neck.1.running_mean' in checkpoint['state_dict']
        assert not any(name.startswith('fc.neck.1.aux') for name in checkpoint['state_dict'])


@pytest.mark.parametrize('model, size', [('test_vit', '160'), ('test_convnext', '64')])
def test_grad_checkpointing(training, model, size):
    training.train('run', '--grad-checkpointing', '--input-size', '3', size, size, model=model, epochs=2)
    assert len(training.record('run')) == 1


def test_naflex(training):
    training.train('run', '--naflex-loader', '--naflex-train-seq-lens', '16', '25', '--naflex-max-seq-len', '16',
                   '--mixup', '0.5', model='naflexvit_base_patch16_gap', epochs=2,
                   options=['loss=squared_cosine'])
    assert len(training.record('run')) == 1


@pytest.fixture
def teacher(tmp_path):
    """A pretrained teacher in a folder, for there is no network."""
    import timm
    from timm.models import save_for_hf
    folder = tmp_path / 'teacher'
    torch.manual_seed(0)
    save_for_hf(timm.create_model('test_resnet', num_classes=CLASSES), folder)
    return f'local-dir:{folder}'


@pytest.mark.parametrize('kind', ['logit', 'feature', 'token'])
@pytest.mark.parametrize('loss', ['criterion', 'squared_cosine'])
def test_distillation(training, teacher, kind, loss):
    model, kwargs = ('deit_tiny_distilled_patch16_224', ['img_size=32']) if kind == 'token' else ('test_resnet', [])
    said = training.train('run', '--kd-model-name', teacher, '--kd-distill-type', kind, model=model, epochs=2,
                          kwargs=kwargs, options=[f'loss={loss}'])
    assert len(training.record('run')) == 1, said


@pytest.mark.parametrize('flags, options, reason', [
    (['--bce-loss'], ['loss=squared_cosine'], 'dl2pa_loss=squared_cosine replaces the criterion'),
    (['--jsd-loss', '--aug-splits', '2'], ['loss=dot_regression'], 'dl2pa_loss=dot_regression replaces the criterion'),
    (['--torchscript'], [], 'cannot be made for TorchScript'),
    (['--head-init-scale', '0.1'], [], 'nothing to initialise or scale'),
    (['--head-init-bias', '0.1'], [], 'nothing to initialise or scale'),
    ([], ['loss=squared_cosine', 'learn_scale=True'], 'would give the learned scale no gradient'),
    ([], ['los=squared_cosine'], 'dl2pa_los: no such option'),
    ([], ['interval=never'], "interval must be 'epoch' or a number of batches"),
])
def test_what_is_refused_before_training(training, flags, options, reason):
    said = training.train('run', *flags, options=options, fails=True)
    assert reason in said and 'Train: 0' not in said


def test_validate_reproduces_the_logged_metric(training):
    training.train('run', options=['interval=3'], epochs=4)
    best = training.checkpoint('run', 'model_best.pth.tar')
    result = training.folder / 'result.json'
    said = run([sys.executable, '-m', 'timm_dl2pa', 'run', f'{REPO}/validate.py', '--dl2pa-dim', '3', '--model',
                'test_resnet', '--num-classes', str(CLASSES), '--checkpoint',
                str(training.file('run', 'model_best.pth.tar')), '--data-dir', str(training.data), '--split',
                'validation', *SIZE, '--device', 'cpu', '-j', '1', '-b', '8', '--results-file', str(result),
                '--results-format', 'json'])
    assert json.loads(said.partition('--result')[2])['top1'] == round(best['metric'], 4)
    assert json.loads(result.read_text())['top1'] == round(best['metric'], 4)


def test_averaged_checkpoints(training):
    start = [sys.executable, '-m', 'timm_dl2pa', 'run', '--dl2pa-dim', '3']
    run_average = [*start, f'{REPO}/avg_checkpoints.py', '-n', '2']
    # Static: the assignments agree.
    training.train('static', options=['stop=0'])
    averaged = training.folder / 'average.pth'
    said = run([*run_average, '--input', str(training.folder / 'static'), '--output', str(averaged)])
    assert 'makes no model' in said
    training.train('again', '--initial-checkpoint', str(averaged), epochs=1)
    # Moving: they differ.
    training.train('moving', options=['interval=3', 'warmup=none'])
    assignments = [training.checkpoint('moving', f'checkpoint-{epoch}.pth.tar')['state_dict']['fc.assignment']
                   for epoch in range(3)]
    # What moved may move back: one of the two epochs after the first has another assignment.
    same = next(epoch for epoch in (1, 2) if not torch.equal(assignments[0], assignments[epoch]))
    for name in (f'checkpoint-{3 - same}', 'last', 'model_best'):
        training.file('moving', f'{name}.pth.tar').unlink()
    mixed = training.folder / 'mixed.pth'
    run([*run_average, '--input', str(training.folder / 'moving'), '--output', str(mixed)])
    said = training.train('refused', '--initial-checkpoint', str(mixed), fails=True)
    assert re.search(r'fc.assignment .*(cannot be averaged|average only those that agree)', said)


def test_starting_from_checkpoints(training):
    """--pretrained-path: the file's backbone under a new head; --initial-checkpoint: the whole model or an error."""
    training.train('plain', dim=None)
    training.train('old', options=['interval=3'])
    plain, old = (str(training.file(name, 'last.pth.tar')) for name in ('plain', 'old'))
    start = ['--lr', '1e-30', '--weight-decay', '0']
    pretrained = [*start, '--pretrained', '--pretrained-path']
    said = training.train('from plain', *pretrained, plain, epochs=1)
    assert 'DL2PA head' not in said
    backbone = training.checkpoint('plain')['state_dict']['conv1.0.weight']
    assert torch.equal(training.checkpoint('from plain')['state_dict']['conv1.0.weight'], backbone)

    was = training.checkpoint('old')['state_dict']
    for dim, kept in ((3, True), (4, False)):
        said = training.train(f'from old {dim}', *pretrained, old, epochs=1, dim=dim)
        assert said.count('holds a model with a DL2PA head') == 1 and 'Unexpected keys' not in said
        assert ('its neck were loaded' in said) == kept and ('does not fit' in said) != kept
        state = training.checkpoint(f'from old {dim}')['state_dict']
        assert torch.equal(state['conv1.0.weight'], was['conv1.0.weight'])
        assert torch.equal(state['fc.neck.0.weight'], was['fc.neck.0.weight']) if kept else True
        assert torch.equal(state['fc.assignment'], torch.arange(CLASSES))
    said = training.train('whole', *start, '--initial-checkpoint', old, epochs=1, options=['stop=0'])
    assert_same_state(training.checkpoint('whole')['state_dict']['fc.assignment'], was['fc.assignment'])
    said = training.train('other', '--initial-checkpoint', old, dim=4, fails=True)
    assert re.search(r'fc\..* has the shape .* in the state dict, but this head.*dim=4', said)


# Here the order of the samples is a function of the epoch.
ORDERED = ['--no-aug']
BATCHES = 3  # an epoch's of a process of two: 30 images, 8 at a time, the rest dropped


@pytest.mark.parametrize('interval', ['epoch', '3'])
def test_resume_is_bit_for_bit(training, interval):
    """Two processes, whose sampler's order depends on the epoch: unbroken; and killed in the third epoch, resumed."""
    options = dict(options=[f'interval={interval}'], processes=2, epochs=5)
    training.train('unbroken', *ORDERED, **options)
    training.train('broken', *ORDERED, kill_after=2 * BATCHES + 1, **options)
    assert training.checkpoint('broken')['epoch'] == 1
    training.train('broken', *ORDERED, '--resume', str(training.file('broken', 'last.pth.tar')), **options)
    assert_same_state(training.checkpoint('broken'), training.checkpoint('unbroken'))
    assert training.record('broken')[-1]['step'] == training.record('unbroken')[-1]['step']
    assert len(training.record('broken')) == len(training.record('unbroken')) > 2


def test_resume_from_recovery(training):
    """timm skips the rest of the epoch; the state in the file is that of the moment, of both processes."""
    options = dict(options=['interval=epoch'], processes=2, epochs=3)
    training.train('broken', *ORDERED, '--recovery-interval', '2', kill_after=BATCHES + 2, **options)
    recovery = training.file('broken', 'recovery-1-1.pth.tar')
    state = torch.load(recovery, weights_only=False)['task_state']['dl2pa']
    assert state['batches'] == 2 and state['scheduler']['clock']['batches'] == BATCHES + 2
    said = training.train('resumed', *ORDERED, '--resume', str(recovery), **options)
    assert f'after epoch 2, batch {BATCHES + 2}:' in said


def test_two_processes(training):
    flags = ['--dist-bn', 'reduce']
    training.train('two', *flags, processes=2, options=['interval=2', 'loss=squared_cosine'])
    training.train('no-ddp-bb', '--no-ddp-bb', '--dist-bn', 'broadcast', processes=2,
                   options=['interval=2', 'neck=linear_bn'])
    for name in ('two', 'no-ddp-bb'):
        assert len(training.record(name)) == 3


def test_other_scripts(training):
    pytest.importorskip('pandas', reason='inference.py needs pandas')
    training.train('run')
    model = ['--model', 'test_resnet', '--num-classes', str(CLASSES), '--checkpoint',
             str(training.file('run', 'last.pth.tar'))]
    start = [sys.executable, '-m', 'timm_dl2pa', 'run', '--dl2pa-dim', '3']
    run([*start, f'{REPO}/inference.py', *model, '--data-dir', str(training.data / 'validation'), *SIZE, '--device',
         'cpu', '-j', '1', '-b', '8', '--topk', '2', '--results-dir', str(training.folder), '--results-format', 'csv'])
    assert list(training.folder.glob('*.csv'))
    said = run([*start, f'{REPO}/benchmark.py', '--model', 'test_resnet', '--bench', 'both', '--device', 'cpu',
                '-b', '4', '--num-classes', str(CLASSES), '--img-size', '32', '--num-bench-iter', '10',
                '--num-warm-iter', '1'])
    assert 'train_samples_per_sec' in said
    said = run([*start, f'{REPO}/train.py', '--help'])
    assert '--dl2pa-interval' in said and '--kd-model-name' in said


def test_onnx_export(training):
    pytest.importorskip('onnxruntime')
    training.train('run')
    run([sys.executable, '-m', 'timm_dl2pa', 'run', '--dl2pa-dim', '3', f'{REPO}/onnx_export.py', '--model',
         'test_resnet', '--num-classes', str(CLASSES), '--checkpoint', str(training.file('run', 'last.pth.tar')),
         '--img-size', '32', '--check-forward', str(training.folder / 'model.onnx')])
    assert (training.folder / 'model.onnx').exists()


def test_a_script_without_tasks_is_refused(training):
    said = run([sys.executable, '-m', 'timm_dl2pa', 'run', '--dl2pa-dim', '3', f'{REPO}/legacy_train.py',
                '--data-dir', str(training.data), '--model', 'test_resnet', '--num-classes', str(CLASSES), *SIZE,
                '--device', 'cpu', '-b', '8', '-j', '1', '--output', str(training.folder)], fails=True)
    assert 'trains without the tasks of timm.task' in said and 'Train: 0' not in said


def test_inspect(training):
    training.train('run', options=['interval=3'])
    said = run([sys.executable, '-m', 'timm_dl2pa', 'inspect', str(training.file('run', 'model_best.pth.tar'))])
    assert 'interval=3' in said and '5 classes, 5 prototypes in 3 dimensions' in said and 're-solves in' in said


RECIPES = sorted((Path(__file__).parents[2] / 'benchmarks' / 'recipes').glob('*.yaml'))


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: path.stem)
def test_recipes_start(data, tmp_path, recipe):
    """A few steps on random images, with a small batch and, where the model takes any, a small size."""
    size = [] if 'swin' in recipe.stem else ['--input-size', '3', '64', '64']
    told = run([sys.executable, f'{REPO}/train.py', *PLUGIN, '--config', str(recipe), '--data-dir', str(data),
                '--num-classes', str(CLASSES), '-b', '20', '--epochs', '1', '--warmup-epochs', '0', '--device', 'cpu',
                '-j', '1', '--amp-dtype', 'bfloat16', '--output', str(tmp_path), '--experiment', 'run', *size])
    assert 'in d=512 dimensions for 5 classes, loss squared_cosine' in told and 're-solved every epoch' in told
    arguments = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    assert arguments['model'] == yaml.safe_load(recipe.read_text())['model'] and arguments['lr'] == 0.5
    with open(tmp_path / 'run' / 'summary.csv') as file:
        assert float(next(csv.DictReader(file))['train_loss']) > 0


def test_there_are_the_recipes_of_the_paper():
    assert [path.stem for path in RECIPES] == [
        'imagenet_resnet101_d512', 'imagenet_resnet50_d512', 'imagenet_swin_t_d512']


def test_warmup_and_priming_from_the_flags(training):
    told = training.train('primed', '--lr', '0.05', options=['prime=3', "warmup_length='2 epochs'"])
    assert 'primed by 3 batches' in told
    told = run([sys.executable, '-m', 'timm_dl2pa', 'run', *training.command('flags', plugin=False, dim=None)[1:],
                '--dl2pa-dim', '3', '--dl2pa-warmup-length', '2 epochs', '--dl2pa-interval', '4'])
    assert 'after a warm-up of 2 epochs' in told
    assert next(iter(training.record('flags')))['epoch'] == '2'
