"""The plugin in timm's tasks, savers and summaries. (test_scripts.py runs timm's own scripts.)"""
import argparse
import csv
import gc
import logging
import math
from contextlib import suppress

import numpy as np
import pytest
import timm
import timm.models._factory as factory
import torch
from timm import utils
from timm.data import Mixup
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, JsdCrossEntropy, SoftTargetCrossEntropy
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    TrainingTask,
)

from tests.helpers.processes import run_ranks
from tests.helpers.stand_in import BATCH, BATCHES, CLASSES, DEVICE, Killed, batches, make_model, train
from timm_dl2pa import (
    AssignmentScheduler,
    DL2PAHead,
    SampledCrossEntropyLoss,
    SquaredCosineLoss,
    default_scale,
    make_prototypes,
    save_prototypes,
)
from timm_dl2pa.scheduling.priming import Primer
from timm_dl2pa.timm_scripts import PluginOptions, install, plugged_in, uninstall
from timm_dl2pa.timm_scripts.criterion import HEAD_LOSSES

pytestmark = pytest.mark.timm


@pytest.fixture(autouse=True)
def plugin():
    with plugged_in():
        yield


def load(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def same(ours, theirs):
    """Whether two states are equal bit for bit, but for the seconds that re-solves took."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours if key != 'seconds')
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def same_checkpoints(one, two):
    one, two = load(one), load(two)
    names = one.keys() - {'args', 'saver'}
    return one.keys() == two.keys() and all(same(one[name], two[name]) for name in names)


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# --- model creation


def test_create_model_takes_the_options():
    model = make_model(dl2pa_dim=3, dl2pa_num_prototypes=8, dl2pa_neck='linear_bn', dl2pa_scale=7, dl2pa_seed=5)
    config = model.get_classifier().config
    assert (config.dim, config.num_prototypes, config.neck, config.scale, config.seed) == (3, 8, 'linear_bn', 7, 5)
    assert make_model(dl2pa_loss='squared_cosine').get_classifier().dim == 128
    assert isinstance(make_model(dl2pa_dim=None).get_classifier(), torch.nn.Linear)


def test_prototypes_from_a_file(tmp_path):
    points = make_prototypes(CLASSES, 4, seed=9)
    save_prototypes(tmp_path / 'points.safetensors', points)
    head = make_model(dl2pa_dim=4, dl2pa_prototypes=str(tmp_path / 'points.safetensors')).get_classifier()
    assert torch.equal(head.prototypes, points)


def test_the_scale_is_learned_with_the_scripts_own_loss_unless_it_is_given():
    for options, learned, scale in ((dict(), True, 4.0), (dict(dl2pa_scale=7), False, 7), (
            dict(dl2pa_scale=7, dl2pa_learn_scale=True), True, 7), (dict(dl2pa_learn_scale=False), False, None), (
            dict(dl2pa_loss='squared_cosine'), False, None), (dict(dl2pa_loss='sampled_cross_entropy'), True, 4.0)):
        config = make_model(dl2pa_dim=3, **options).get_classifier().config
        assert config.learn_scale == learned and config.neck == 'linear_bn'
        assert config.scale == (scale or pytest.approx(default_scale(CLASSES)))


@pytest.mark.parametrize('options, reason', [
    (dict(dl2pa_dimm=3), 'dl2pa_dimm: no such option. There are dl2pa_recipe, dl2pa_dim, '),
    (dict(dl2pa_dim='three'), "dl2pa_dim must be int, not 'three'"),
    (dict(dl2pa_dim=True), 'dl2pa_dim must be int, not True'),
    (dict(dl2pa_learn_scale='true'), "dl2pa_learn_scale must be bool, not 'true'"),
    (dict(dl2pa_loss='cosine'), 'dl2pa_loss must be one of criterion, squared_cosine, dot_regression, sampled_cro'),
    (dict(dl2pa_loss_weight=3.0), 'dl2pa_loss_weight is a factor on squared_cosine and dot_regression: it has no'),
    (dict(dl2pa_num_sampled=3), "no meaning with dl2pa_loss='criterion'"),
    (dict(dl2pa_loss='sampled_cross_entropy', dl2pa_num_sampled=0), 'dl2pa_num_sampled must be at least 1, not 0'),
    (dict(dl2pa_loss='sampled_cross_entropy', dl2pa_loss_weight=2), "meaning with dl2pa_loss='sampled_cross_entropy'"),
    (dict(dl2pa_loss='balanced_softmax', dl2pa_loss_weight=3.0), "no meaning with dl2pa_loss='balanced_softmax'"),
    (dict(dl2pa_dim=3, scriptable=True), 'cannot be made for TorchScript'),
    (dict(dl2pa_recipe='fast'), "dl2pa_recipe must be one of placed, even, paper, not 'fast'"),
    (dict(dl2pa_warmup_epochs=1), 'dl2pa_warmup_epochs: no such option'),
    (dict(dl2pa_prime=-1), 'dl2pa_prime must be at least 0, not -1. Leave it out for the default, 0.'),
    (dict(dl2pa_dim=float('nan')), 'dl2pa_dim must be int, not nan'),
    (dict(dl2pa_dim=0), 'dl2pa_dim must be at least 1, not 0'),
    (dict(dl2pa_scale=float('nan')), 'dl2pa_scale must be above 0 and finite, not nan. Leave it out for the default.'),
    (dict(dl2pa_scale=1e-9), 'dl2pa_scale must be between 1e-06 and 1e'),
    (dict(dl2pa_start='5'), "dl2pa_start must be int, not '5'"),
    (dict(dl2pa_start=2.0), 'dl2pa_start must be int, not 2.0'),
    (dict(dl2pa_stop=-1), 'dl2pa_stop must be at least 0, not -1'),
    (dict(dl2pa_lag=0), 'dl2pa_lag must be at least 1, not 0. Leave it out for the default, 16.'),
    (dict(dl2pa_interval=0), 'dl2pa_interval must be at least 1, not 0'),
    (dict(dl2pa_interval='weekly'), "dl2pa_interval must be 'epoch' or a number of batches"),
    (dict(dl2pa_interval='100:50,50:20'), "dl2pa_interval must not be '100:50,50:20': stages must end one after"),
    (dict(dl2pa_interval=10 ** 5000), 'dl2pa_interval must be at least 1, not a huge int'),
    (dict(dl2pa_warmup_length='long'), "dl2pa_warmup_length must be a number of batches >= 1, '5 epochs'"),
    (dict(dl2pa_warmup_length='9' * 101), 'dl2pa_warmup_length must have at most 100 characters, not 101'),
    (dict(dl2pa_warmup='slow'), 'dl2pa_warmup must be one of placed, rotated, none'),
    (dict(dl2pa_neck='mlp'), 'dl2pa_neck must be one of linear, linear_bn, none'),
    (dict(dl2pa_neck='none'), "dl2pa_neck='none' uses the features as the embedding, so dim must be their number"),
    (dict(dl2pa_num_prototypes=2), 'dl2pa_num_prototypes must be at least num_classes=5'),
    (dict(dl2pa_momentum=1.5), 'dl2pa_momentum must be from 0 to 1, not 1.5'),
    (dict(dl2pa_min_gain=1), 'dl2pa_min_gain must be from 0 to below 1, not 1'),
    (dict(dl2pa_evenness=math.inf), 'dl2pa_evenness must be at least 0 and finite, not inf'),
    (dict(dl2pa_loss='squared_cosine', dl2pa_loss_weight=math.nan), 'dl2pa_loss_weight must be above 0'),
    (dict(dl2pa_class_weights='inverse'), "dl2pa_class_weights must be one of auto, not 'inverse'"),
])
def test_options_that_are_no_good(options, reason):
    with pytest.raises(ValueError) as error:
        make_model(**options)
    assert reason in str(error.value)


@pytest.mark.parametrize('name', ['dim', 'seed', 'interval', 'start', 'min_gain', 'background', 'lag', 'prime'])
def test_none_is_no_value_of_options_that_have_one(name):
    """timm leaves arguments of None out; others do not."""
    with pytest.raises(ValueError, match=f'dl2pa_{name} must be .*, not None. Leave it out for the default, '):
        PluginOptions.take({f'dl2pa_{name}': None})


def test_options_that_do_not_fit_one_another():
    model = make_model(dl2pa_dim=3, dl2pa_recipe='paper', dl2pa_evenness=1.0)
    with pytest.raises(ValueError, match=r"^dl2pa_evenness=1\.0 is for the warm-up 'placed'"):
        ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss())


def test_numbers_of_numpy_and_torch_become_plain_ones():
    options = make_model(dl2pa_dim=np.int64(3), dl2pa_scale=np.float32(8), dl2pa_lag=torch.tensor(4)).dl2pa_options
    assert (options.dim, options.scale, options.lag) == (3, 8.0, 4)
    assert {type(value) for value in (options.dim, options.lag)} == {int} and type(options.scale) is float


def test_a_first_model_alone_gets_the_options_of_a_script_that_passes_none():
    uninstall()
    with plugged_in(PluginOptions(dim=3)):
        assert isinstance(make_model().get_classifier(), DL2PAHead)
        assert isinstance(make_model().get_classifier(), torch.nn.Linear)


def test_nothing_is_left_after_an_error():
    uninstall()
    before = (factory.model_entrypoint, utils.CheckpointSaver.__init__, utils.update_summary)
    with pytest.raises(KeyError), plugged_in():
        install()
        assert factory.model_entrypoint is not before[0]
        raise KeyError
    assert (factory.model_entrypoint, utils.CheckpointSaver.__init__, utils.update_summary) == before
    task = ClassificationTask(make_model(), criterion=torch.nn.CrossEntropyLoss())
    assert type(task) is ClassificationTask
    with pytest.raises(TypeError):
        make_model(dl2pa_dim=3)


def test_a_timm_that_lacks_something_is_refused_with_the_versions_that_work(monkeypatch):
    uninstall()
    monkeypatch.delattr(TrainingTask, 'get_task_state')
    before = factory.model_entrypoint
    reason = 'works with timm 1.0.27 and newer; timm .* lacks TrainingTask.get_task_state'
    with pytest.raises(RuntimeError, match=reason):
        install()
    assert factory.model_entrypoint is before


def test_without_options_everything_is_as_without_the_plugin(tmp_path):
    random = torch.get_rng_state()
    task = train(tmp_path / 'with')
    assert type(task) is ClassificationTask
    after = torch.get_rng_state()
    uninstall()
    torch.set_rng_state(random)
    assert train(tmp_path / 'without').losses == task.losses
    assert torch.equal(after, torch.get_rng_state())
    assert same_checkpoints(tmp_path / 'with' / 'last.pth.tar', tmp_path / 'without' / 'last.pth.tar')
    assert rows(tmp_path / 'with' / 'summary.csv') == rows(tmp_path / 'without' / 'summary.csv')
    assert not (tmp_path / 'with' / 'dl2pa.csv').exists()


# --- training


def by_hand(interval, epochs=3):
    """The same training as a plain loop, and the assignment in force at each batch."""
    model = make_model(dl2pa_dim=3).train()
    head = model.get_classifier()
    scheduler = AssignmentScheduler(model, interval=interval, warmup_length='1 epoch')
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)
    losses = []
    for epoch in range(epochs):
        for images, labels in batches(epoch):
            scheduler.resolve_if_due()
            loss = criterion(model(images), labels)
            scheduler.step(labels)      # before the optimizer's step, as the task does: the scale is learned
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        scheduler.epoch_end()
    return losses, head.assignment, scheduler.history


@pytest.mark.parametrize('interval', ['epoch', 2])
def test_the_task_trains_as_the_plain_loop_does(tmp_path, caplog, interval):
    caplog.set_level(logging.INFO)
    task = train(tmp_path, dl2pa_dim=3, dl2pa_interval=interval, dl2pa_warmup_length='1 epoch')
    assert isinstance(task, ClassificationTask) and type(task).__name__ == 'ClassificationTask'
    losses, assignment, history = by_hand(interval)
    assert task.losses == losses
    assert torch.equal(task.dl2pa_heads[0].assignment, assignment)
    ours = task.assignment_scheduler.history
    assert [(u.step, u.epoch, u.moved, u.objective) for u in ours] == [
        (u.step, u.epoch, u.moved, u.objective) for u in history]
    assert [update.step for update in ours] == ([4, 8] if interval == 'epoch' else [4, 6, 8, 10])
    assert [update.event for update in ours] == ['placed', *['resolve'] * (len(ours) - 1)]
    # Placed for an epoch, the labels need not move.
    assert (interval == 'epoch' or any(update.moved for update in ours)) and task.dl2pa_heads[0].config.own_prototypes

    # What the user sees: one line at the start and one a re-solve, a file beside the summary, and the summary.
    lines = [record.message for record in caplog.records if record.message.startswith('DL2PA')]
    assert 'K=5' in lines[0] and 'd=3' in lines[0] and 'LabelSmoothingCrossEntropy' in lines[0]
    assert f're-solved every {"epoch" if interval == "epoch" else "2 batches"}, exactly' in lines[0]
    assert len(lines) == 1 + len(ours)
    assert f'batch {ours[0].step}: the prototypes are fixed from now on' in lines[1]
    assert f'batch {ours[1].step}: {ours[1].moved} of 5 labels moved' in lines[2]
    assert f'{ours[0].objective_before / 5:.4f} -> {ours[0].objective / 5:.4f}' in lines[1]
    record = rows(tmp_path / 'dl2pa.csv')
    assert [int(row['moved']) for row in record] == [update.moved for update in ours]
    assert [float(row['objective']) for row in record] == pytest.approx([update.objective / 5 for update in ours])
    summary = rows(tmp_path / 'summary.csv')
    assert summary[-1]['train_dl2pa_moved'] == str(ours[-1].moved) and len(summary) == 3
    assert [row['train_dl2pa_resolves'] for row in summary] == (['0', '0', '1'] if interval == 'epoch' else
                                                                ['0', '1', '3'])
    assert [row['event'] for row in record] == [update.event for update in ours]


def test_weights_and_biases_gets_the_figures(tmp_path, monkeypatch):
    logged = []

    class Wandb:
        log = staticmethod(logged.append)

    monkeypatch.setattr('timm.utils.summary.wandb', Wandb, raising=False)
    train(tmp_path, dl2pa_dim=3, epochs=2, log_wandb=True, dl2pa_warmup='none')
    assert logged[1]['train_dl2pa_resolves'] == 1 and 'train_dl2pa_objective' in logged[1]


OFFERS = {
    'squared cosine': dict(dl2pa_loss='squared_cosine'),
    'dot regression': dict(dl2pa_loss='dot_regression', dl2pa_loss_weight=2.0),
    'mixup': dict(mixup=dict(mixup_alpha=0.8), criterion=SoftTargetCrossEntropy()),
    'cutmix, squared cosine': dict(mixup=dict(mixup_alpha=0, cutmix_alpha=1.0), dl2pa_loss='squared_cosine'),
    'mixup, dot regression': dict(mixup=dict(mixup_alpha=0.8), dl2pa_loss='dot_regression'),
    'balanced softmax': dict(dl2pa_loss='balanced_softmax'),
    'sampled': dict(dl2pa_loss='sampled_cross_entropy', dl2pa_num_sampled=2),
    'sampled, compiled, bfloat16': dict(compiled=True, autocast=torch.bfloat16, dl2pa_loss='sampled_cross_entropy'),
    'mixup, sampled': dict(mixup=dict(mixup_alpha=0.8), dl2pa_loss='sampled_cross_entropy'),
    'mixup, balanced softmax': dict(mixup=dict(mixup_alpha=0.8), dl2pa_loss='balanced_softmax'),
    'bce': dict(criterion=BinaryCrossEntropy()),
    'jsd': dict(criterion=JsdCrossEntropy(num_splits=2, smoothing=0.1)),
    'accumulation': dict(accumulate=2),
    'bfloat16': dict(autocast=torch.bfloat16),
    'float16': dict(autocast=torch.float16, dl2pa_loss='squared_cosine'),
    'bfloat16 model': dict(dtype=torch.bfloat16),
    'compiled': dict(compiled=True, dl2pa_loss='squared_cosine'),
    'compiled, ema': dict(compiled=True, ema=True),
    'learned scale': dict(dl2pa_learn_scale=True),
    'clip agc': dict(clip='agc'),
    'clip norm': dict(clip='norm'),
    'no validation': dict(validate=False),
    'several classifiers': dict(name='deit_tiny_distilled_patch16_224', img_size=32, depth=1,
                                dl2pa_loss='squared_cosine'),
}


@pytest.mark.slow
@pytest.mark.parametrize('offer', OFFERS)
def test_what_a_script_offers(tmp_path, offer):
    options = dict(OFFERS[offer])
    if 'mixup' in options:
        options['mixup'] = Mixup(num_classes=CLASSES, label_smoothing=0.1, **options['mixup'])
    task = train(tmp_path, dl2pa_dim=3, **options)
    assert [update.epoch for update in task.assignment_scheduler.history] == [2]
    assert all(map(torch.isfinite, map(torch.tensor, task.losses)))
    state = load(tmp_path / 'last.pth.tar')
    assert state['task_state']['dl2pa']['scheduler']['clock']['batches'] == 3 * BATCHES
    for head in task.dl2pa_heads:
        assert torch.equal(head.assignment, task.dl2pa_heads[0].assignment)
    kind = HEAD_LOSSES.get(options.get('dl2pa_loss'))
    if kind is SampledCrossEntropyLoss:
        head, start = task.dl2pa_heads[0], make_model(dl2pa_dim=3).get_classifier()
        assert head.train_output == 'embeddings' and not torch.equal(head.log_scale, start.log_scale)
        assert task.criterion.sampler.num_sampled == options.get('dl2pa_num_sampled', CLASSES)
        assert task.criterion.label_smoothing == 0.1
        assert task.criterion.sampler.step == (0 if 'mixup' in options else 3 * BATCHES)
    elif kind is not None:
        assert type(task.criterion) is kind
        # No (B, C) logits where a model has one classifier.
        assert task.dl2pa_heads[0].train_output == ('embeddings' if len(task.dl2pa_heads) == 1 else 'logits')
        assert task.criterion.weight == options.get('dl2pa_loss_weight', 30 if kind is SquaredCosineLoss else 1)
    if options.get('dl2pa_loss') == 'balanced_softmax':
        assert task.dl2pa_heads[0].config.learn_scale and task.dl2pa_heads[0].train_output == 'logits'
        # One more for each class than there were targets.
        assert task.criterion.class_counts.sum().item() == pytest.approx(CLASSES + 3 * BATCHES * BATCH)
    if 'ema' in offer:
        name = 'fc.assignment'
        assert torch.equal(state['state_dict_ema'][name], state['state_dict'][name])
        assert 'task_state_ema' not in state


def test_split_batch_norm_leaves_the_necks_alone(tmp_path):
    model = convert_splitbn_model(make_model(dl2pa_dim=3, dl2pa_neck='linear_bn'), 2)
    assert type(model.get_classifier().neck[1]) is torch.nn.BatchNorm1d
    assert any('SplitBatchNorm' in type(module).__name__ for module in model.modules())
    task = train(tmp_path, model=model)
    assert [update.event for update in task.assignment_scheduler.history] == ['placed']


def test_synchronised_batch_norm_reaches_the_necks():
    """Only its place is tested: it takes a GPU to run."""
    model = convert_sync_batchnorm(make_model(dl2pa_dim=3, dl2pa_neck='linear_bn'))
    assert type(model.get_classifier().neck[1]) is torch.nn.SyncBatchNorm


def test_adaptive_clipping_leaves_out_the_heads_parameters():
    model = make_model(dl2pa_dim=3, dl2pa_neck='linear_bn')
    task = ClassificationTask(model, criterion=torch.nn.CrossEntropyLoss())
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    left = list(task.get_clip_parameters(exclude_head=True))
    assert len(head) == 4 and not head & {id(parameter) for parameter in left}
    assert len(list(task.get_clip_parameters())) == len(left) + 4 == len(list(model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize('kind', [LogitDistillationTask, FeatureDistillationTask, TokenDistillationTask])
@pytest.mark.parametrize('loss', ['criterion', 'squared_cosine'])
def test_distillation(tmp_path, kind, loss):
    student = {}
    if kind is TokenDistillationTask:
        student = dict(name='deit_tiny_distilled_patch16_224', img_size=32, depth=1)
    teacher = make_model('test_efficientnet')

    def make_task(model, **kwargs):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the projection of feature distillation
            return kind(student_model=model, teacher_model=teacher, **kwargs)

    options = dict(make_task=make_task, dl2pa_dim=3, dl2pa_loss=loss, dl2pa_warmup_length='1 epoch', **student)
    task = train(tmp_path / 'unbroken', **options)
    assert [update.epoch for update in task.assignment_scheduler.history] == [1, 2]
    state = load(tmp_path / 'unbroken' / 'last.pth.tar')['task_state']
    # timm's own task state is there beside ours.
    assert ('projection' in state) == (kind is FeatureDistillationTask)
    train(tmp_path / 'broken', epochs=2, **options)
    train(tmp_path / 'broken', resume=tmp_path / 'broken' / 'last.pth.tar', **options)
    assert same_checkpoints(tmp_path / 'broken' / 'last.pth.tar', tmp_path / 'unbroken' / 'last.pth.tar')


@pytest.mark.parametrize('options, reason', [
    (dict(dl2pa_loss='squared_cosine', criterion=BinaryCrossEntropy()), 'leave out either it or --bce-loss'),
    (dict(dl2pa_loss='dot_regression', criterion=JsdCrossEntropy()), 'leave out either it or --bce-loss'),
    (dict(dl2pa_loss='squared_cosine', dl2pa_learn_scale=True), 'would give the learned scale no gradient'),
    (dict(mixup=lambda x, y: (x, torch.ones(len(x), CLASSES))), 'multi-label targets'),
])
def test_what_is_refused_before_training(tmp_path, options, reason):
    model = make_model(**{'dl2pa_dim': 3, **{name: value for name, value in options.items() if 'dl2pa' in name}})
    before = {name: value.clone() for name, value in model.state_dict().items() if 'running' not in name}
    with pytest.raises(ValueError, match=reason):
        train(tmp_path, model=model, **{name: value for name, value in options.items() if 'dl2pa' not in name})
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_multi_label_tasks_are_refused():
    task = pytest.importorskip('timm.task')
    if not hasattr(task, 'MultiLabelClassificationTask'):
        pytest.skip('this timm has no multi-label task')
    with pytest.raises(ValueError, match='multi-label targets have no meaning'):
        task.MultiLabelClassificationTask(make_model(dl2pa_dim=3))


def test_initial_scaling_of_the_classifier_is_refused_with_the_reason():
    classifier = make_model(dl2pa_dim=3).get_classifier()
    for name in ('weight', 'bias'):
        with pytest.raises(AttributeError, match='--head-init-scale'):
            getattr(classifier, name)
    assert not hasattr(classifier, 'weight')


def test_a_script_without_tasks_is_refused_when_it_makes_its_saver(tmp_path):
    model = make_model(dl2pa_dim=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r'trains without the tasks of timm\.task.*timm 1\.0\.27 or newer'):
        utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path))
    utils.CheckpointSaver(make_model(), optimizer, checkpoint_dir=str(tmp_path))


# --- the warm-up, and priming


def test_the_warmup_counts_epochs_whatever_the_interval(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    task = train(tmp_path, dl2pa_dim=3, dl2pa_interval=3, dl2pa_warmup_length='2 epochs')
    assert [update.step for update in task.assignment_scheduler.history] == [8]
    assert 'after a warm-up of 2 epochs' in caplog.text
    paper = train(tmp_path, dl2pa_dim=3, dl2pa_interval=3, dl2pa_warmup='none')
    assert [update.step for update in paper.assignment_scheduler.history] == [3, 6, 9]
    fresh = make_model(dl2pa_dim=3).get_classifier().prototypes
    assert torch.equal(paper.dl2pa_heads[0].prototypes, fresh)
    assert not torch.allclose(task.dl2pa_heads[0].prototypes, fresh, atol=1e-3)


def test_the_averaged_model_has_the_rotated_prototypes(tmp_path):
    for options in (dict(), dict(dl2pa_prime=3)):
        task = train(tmp_path, dl2pa_dim=3, ema=True, **options)
        averaged = task.get_trainable_module(ema=True).module.get_classifier()
        assert torch.equal(averaged.prototypes, task.dl2pa_heads[0].prototypes)
        assert torch.equal(averaged.assignment, task.dl2pa_heads[0].assignment)
        assert not torch.equal(averaged.neck[0].weight, task.dl2pa_heads[0].neck[0].weight)
        make_model(dl2pa_dim=3).load_state_dict(load(tmp_path / 'last.pth.tar')['state_dict_ema'])


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    dict(), dict(dl2pa_loss='squared_cosine'), dict(autocast=torch.bfloat16), dict(compiled=True),
    dict(mixup=dict(mixup_alpha=0.8)), dict(name='deit_tiny_distilled_patch16_224', img_size=32, depth=1)], ids=str)
def test_primed_batches_are_not_trained_on(tmp_path, caplog, options):
    caplog.set_level(logging.INFO)
    if 'mixup' in options:
        options = {**options, 'criterion': SoftTargetCrossEntropy(),
                   'mixup': Mixup(num_classes=CLASSES, **options['mixup'])}
    start = make_model(dl2pa_dim=3, **{name: value for name, value in options.items()
                                       if name in ('name', 'img_size', 'depth')})
    before = {name: value.clone() for name, value in start.named_parameters()}
    # As many as there are: nothing but gathering.
    task = train(tmp_path / 'gathering', dl2pa_dim=3, dl2pa_prime=2 * BATCHES, epochs=2, **options)
    after = {name.removeprefix('_orig_mod.'): value for name, value in task.get_trainable_module().named_parameters()}
    assert all(torch.equal(before[name], value) for name, value in after.items())
    assert 'primed by the first 8 batches' in caplog.text and 'were not trained on' not in caplog.text
    task = train(tmp_path / 'training', dl2pa_dim=3, dl2pa_prime=BATCHES, epochs=3, **options)
    assert not any(task.losses[:BATCHES]) and all(task.losses[BATCHES:])
    assert 'primed by 4 batches' in caplog.text
    gc.collect()
    assert not any(type(thing) is Primer for thing in gc.get_objects())  # its sums would stay in memory
    assert not task.assignment_scheduler.warming_up
    assert [update.step for update in task.assignment_scheduler.history] == [2 * BATCHES - 4]


@pytest.mark.filterwarnings('error:AssignmentScheduler')
def test_many_primed_batches_are_no_loop_that_forgot_its_steps(tmp_path):
    task = train(tmp_path, dl2pa_dim=3, dl2pa_prime=22, epochs=6)
    assert task.assignment_scheduler.steps == 6 * BATCHES - 22


def test_a_recovery_checkpoint_in_the_midst_of_priming(tmp_path):
    options = dict(dl2pa_dim=3, dl2pa_prime=4 * BATCHES - 1, epochs=4)
    train(tmp_path / 'unbroken', **options)
    with pytest.raises(Killed):
        train(tmp_path / 'broken', die_after=BATCHES + 2, recovery_interval=BATCHES, **options)
    train(tmp_path / 'broken', resume=tmp_path / 'broken' / 'checkpoint-0.pth.tar', **options)
    assert same_checkpoints(tmp_path / 'broken' / 'last.pth.tar', tmp_path / 'unbroken' / 'last.pth.tar')


# --- resuming


@pytest.mark.slow
@pytest.mark.parametrize('how', [dict(), dict(interval=3), dict(interval=3, warmup_length='2 epochs'),
                                 dict(warmup='none'), dict(recipe='even'), dict(recipe='paper'),
                                 dict(prime=6), dict(prime=2, loss='squared_cosine'), dict(loss='balanced_softmax'),
                                 dict(loss='sampled_cross_entropy', num_sampled=1),
                                 dict(interval='2:8,3', background=True, lag=3, min_gain=0.01, warmup='none')],
                         ids=str)
@pytest.mark.parametrize('stopped_after', [1, 2, 3])
def test_resume_after_any_epoch_is_bit_for_bit(tmp_path, how, stopped_after):
    options = dict(dl2pa_dim=3, ema=True, **{f'dl2pa_{name}': value for name, value in how.items()})
    train(tmp_path / 'unbroken', epochs=4, **options)
    train(tmp_path / 'broken', epochs=4, stop_after=stopped_after, **options)
    train(tmp_path / 'broken', epochs=4, resume=tmp_path / 'broken' / 'last.pth.tar', **options)
    assert same_checkpoints(tmp_path / 'broken' / 'last.pth.tar', tmp_path / 'unbroken' / 'last.pth.tar')
    seconds = dict(seconds=None)
    assert [{**row, **seconds} for row in rows(tmp_path / 'broken' / 'dl2pa.csv')] == [
        {**row, **seconds} for row in rows(tmp_path / 'unbroken' / 'dl2pa.csv')]


def test_the_scheduler_gets_its_options(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    task = train(tmp_path, dl2pa_dim=3, dl2pa_interval='2:4,3', dl2pa_background=True, dl2pa_lag=2, dl2pa_min_gain=0.01,
                 dl2pa_warmup='none')
    assert 're-solved every 2 (up to 4), then 3 batches in the background, 2 batches behind, exactly' in caplog.text
    assert task.assignment_scheduler.resolver.min_gain == 0.01
    # The one that fell due after the fourth batch began when the first was taken, both before the fifth.
    assert [update.step for update in task.assignment_scheduler.history] == [2, 4, 7]


def test_resume_after_a_kill_goes_on_from_the_last_checkpoint(tmp_path):
    options = dict(dl2pa_dim=3, dl2pa_interval=3)
    train(tmp_path / 'unbroken', **options)
    with pytest.raises(Killed):
        train(tmp_path / 'broken', die_after=BATCHES + 2, **options)
    train(tmp_path / 'broken', resume=tmp_path / 'broken' / 'last.pth.tar', **options)
    assert same_checkpoints(tmp_path / 'broken' / 'last.pth.tar', tmp_path / 'unbroken' / 'last.pth.tar')


def test_a_recovery_checkpoint_holds_the_state_of_its_moment(tmp_path):
    options = dict(dl2pa_dim=3, dl2pa_warmup_length='1 epoch')
    with pytest.raises(Killed):
        train(tmp_path, die_after=BATCHES + 2, recovery_interval=2, **options)
    recovery = tmp_path / 'recovery-1-1.pth.tar'
    state = load(recovery)['task_state']['dl2pa']
    clock = state['scheduler']['clock']
    assert state['batches'] == 2 and clock['batches'] == BATCHES + 2 and clock['epochs'] == 1
    task = train(tmp_path, resume=recovery, **options)
    # timm skips the rest of that epoch; our epoch is over with it.
    assert [(update.epoch, update.step) for update in task.assignment_scheduler.history] == [
        (1, BATCHES), (2, BATCHES + 2)]


def test_a_checkpoint_is_validated_and_saved_under_the_same_assignment(tmp_path):
    task = train(tmp_path, dl2pa_dim=3)
    epochs = [load(tmp_path / f'checkpoint-{epoch}.pth.tar') for epoch in range(3)]
    for checkpoint in epochs:
        model = make_model(dl2pa_dim=3)
        model.load_state_dict(checkpoint['state_dict'])
        images, labels = next(batches(1000))
        with torch.inference_mode():
            assert utils.accuracy(model.eval()(images), labels)[0].item() == checkpoint['metric']
    assert torch.equal(epochs[-1]['state_dict']['fc.assignment'], task.dl2pa_heads[0].assignment)


def test_a_checkpoint_without_our_state_starts_the_class_means_anew(caplog):
    task = ClassificationTask(make_model(dl2pa_dim=3), criterion=torch.nn.CrossEntropyLoss())
    task.load_checkpoint_state(task.get_checkpoint_state()['state_dict'], None)
    assert 'class means and schedule start from the beginning' in caplog.text


# --- starting from files


def test_pretrained_path_gives_a_new_head_on_the_files_backbone(tmp_path, caplog):
    def start(path, **options):
        caplog.clear()
        overlay = dict(file=str(path), num_classes=-1)
        model = make_model(pretrained=True, pretrained_cfg_overlay=overlay, dl2pa_neck='linear', **options)
        warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        return model, warnings

    plain = make_model()
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    old = make_model(dl2pa_dim=3, dl2pa_neck='linear')
    old.get_classifier().assign(torch.tensor([1, 0, 2, 4, 3]))
    with torch.no_grad():
        old.get_classifier().neck.weight.fill_(0.5)
        old.conv1[0].weight.fill_(0.25)
    torch.save(old.state_dict(), tmp_path / 'old.pth')

    model, warnings = start(tmp_path / 'plain.pth', dl2pa_dim=3)
    assert torch.equal(model.conv1[0].weight, plain.conv1[0].weight) and not warnings
    for dim, fits in ((3, True), (4, False)):
        model, warnings = start(tmp_path / 'old.pth', dl2pa_dim=dim)
        head = model.get_classifier()
        assert (model.conv1[0].weight == 0.25).all()
        assert (head.neck.weight == 0.5).all() == fits
        assert head.assignment.tolist() == list(range(CLASSES))
        assert len(warnings) == 1 and ('does not fit' in warnings[0]) != fits
        assert model.pretrained_cfg['file'] == str(tmp_path / 'old.pth') and not model.pretrained_cfg['state_dict']


def test_checkpoint_path_loads_whole_or_is_refused(tmp_path):
    old = make_model(dl2pa_dim=3)
    old.get_classifier().assign(torch.tensor([1, 0, 2, 4, 3]))
    torch.save(old.state_dict(), tmp_path / 'old.pth')
    path = str(tmp_path / 'old.pth')
    assert make_model(dl2pa_dim=3, checkpoint_path=path).get_classifier().assignment.tolist() == [1, 0, 2, 4, 3]
    with pytest.raises(RuntimeError, match=r'fc\..*has the shape .* but this head, with num_classes=5.*dim=4'):
        make_model(dl2pa_dim=4, checkpoint_path=path)
    with pytest.raises(RuntimeError, match=r'fc\..*has the shape .* but this head, with num_classes=6'):
        timm.create_model('test_resnet', num_classes=6, dl2pa_dim=3, checkpoint_path=path)


# --- two processes


# No batch norm, no step: samples alone matter.
DISTRIBUTED = dict(name='test_vit', img_size=32, dl2pa_dim=3, dl2pa_neck='linear', dl2pa_warmup_length='1 epoch',
                   lr=0.0)


def in_process(rank, folder):
    answers = {}
    with plugged_in():
        for name, options in (
                ('epoch', dict(dl2pa_loss='squared_cosine')),
                ('sampled', dict(dl2pa_loss='sampled_cross_entropy', dl2pa_num_sampled=2)),
                ('batches', dict(dl2pa_interval=3, broadcast_buffers=False)),
                ('paper', dict(dl2pa_warmup='none')),
                ('primed', dict(dl2pa_prime=2)),
                ('no validation', dict(validate=False, dl2pa_recipe='even')),
                ('batch norm', dict(name='test_resnet', img_size=None, dl2pa_neck='linear_bn', lr=0.05)),
        ):
            task = train(f'{folder}/{name}', **{**DISTRIBUTED, **options})
            model = task.get_eval_model().module if name == 'batch norm' else None
            if model is not None:
                utils.distribute_bn(task.get_trainable_module(), 2, True)
                answers['necks agree'] = model.get_classifier().neck[1].running_mean.tolist()
            answers[name] = (task.dl2pa_heads[0].assignment.tolist(),
                             [(update.step, update.moved) for update in task.assignment_scheduler.history])
        with suppress(Killed):
            train(f'{folder}/killed', die_after=BATCHES + 2, recovery_interval=2, **DISTRIBUTED)
        if rank == 0:
            answers['recovery'] = load(f'{folder}/killed/recovery-1-1.pth.tar')['task_state']['dl2pa']['scheduler']
        task = train(f'{folder}/resumed', resume=f'{folder}/epoch/checkpoint-1.pth.tar', dl2pa_loss='squared_cosine',
                     **DISTRIBUTED)
        answers['resumed'] = task.dl2pa_heads[0].assignment.tolist()

        # An error where the solving is done ends all processes with that error.
        def poison(images, labels):
            return images * float('nan') if rank == 1 else images, labels

        try:
            train(f'{folder}/error', mixup=poison, **DISTRIBUTED)
        except ValueError as error:
            answers['error'] = str(error)
    torch.save(answers, f'{folder}/{rank}.pt')


@pytest.mark.slow
def test_two_processes(tmp_path):
    run_ranks(in_process, str(tmp_path), folder=tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    for name in ('epoch', 'sampled', 'batches', 'paper', 'primed', 'no validation', 'batch norm', 'resumed'):
        assert first[name] == second[name]

    # One process with the same samples comes to the same assignments, and sums up the same class means.
    for name, options in (('epoch', dict(dl2pa_loss='squared_cosine')),
                          ('batches', dict(dl2pa_interval=3)), ('paper', dict(dl2pa_warmup='none')),
                          ('primed', dict(dl2pa_prime=2)),
                          ('no validation', dict(validate=False, dl2pa_recipe='even'))):
        task = train(tmp_path / f'alone {name}', **{**DISTRIBUTED, **options})
        history = [(update.step, update.moved) for update in task.assignment_scheduler.history]
        assert first[name] == (task.dl2pa_heads[0].assignment.tolist(), history)
        if name not in ('batches', 'primed'):
            assert any(moved for _, moved in history)
        saved = [load(tmp_path / folder / 'last.pth.tar') for folder in (f'alone {name}', name)]
        if name in ('batches', 'primed'):  # placed: labels need not move then
            alone, together = (checkpoint['state_dict']['head.prototypes'] for checkpoint in saved)
            even = make_model(dl2pa_dim=3).get_classifier().prototypes
            assert torch.allclose(alone, together, atol=1e-4) and not torch.allclose(alone, even, atol=0.1)
        alone, together = (checkpoint['task_state']['dl2pa']['scheduler'] for checkpoint in saved)
        assert torch.allclose(alone['class_means']['sums'], together['class_means']['sums'], atol=1e-4)
        assert alone['class_means']['sums'].abs().sum() > 1
    assert first['resumed'] == first['epoch'][0]
    with pytest.raises(Killed):
        train(tmp_path / 'alone killed', die_after=BATCHES + 2, recovery_interval=2, **DISTRIBUTED)
    alone = load(tmp_path / 'alone killed' / 'recovery-1-1.pth.tar')['task_state']['dl2pa']['scheduler']
    assert torch.allclose(alone['class_means']['sums'], first['recovery']['class_means']['sums'], atol=1e-4)
    assert first['error'] == second['error'] and 'not finite' in first['error']


def test_the_device_ids_of_a_cpu_are_left_out():
    """What timm's script passes, DistributedDataParallel refuses; on another device they are passed on."""
    seen = []

    class Base(TrainingTask):
        def __init__(self, model, criterion=None, device=None):
            super().__init__(device=device)
            self.trainable_module, self.criterion = model, criterion

        def prepare_distributed(self, device_ids=None, **kwargs):
            seen.append((device_ids, kwargs))
            return self

    task = Base(make_model(dl2pa_dim=3), device=DEVICE)
    task.prepare_distributed(device_ids=[DEVICE], broadcast_buffers=False)
    task.device = torch.device('cuda', 0)
    task.prepare_distributed(device_ids=[0])
    assert seen == [(None, {'broadcast_buffers': False}), ([0], {})]
