"""Lightning's Trainer with one callback: resuming to the bit, its averages of weights, its loggers, two processes."""
import importlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from tests.helpers.integrations import Killed, as_launched, outcome, same, tiny_data, tiny_model
from tests.helpers.processes import run_ranks
from timm_dl2pa import AssignmentScheduler, prime

pytest.importorskip('lightning', reason='needs lightning: pip install "timm-dl2pa[lightning]"')

pytestmark = pytest.mark.filterwarnings('ignore:.*litlogger', 'ignore:.*does not have many workers',
                                        'ignore:.*treespec', 'ignore:.*Checkpoint directory', 'ignore::FutureWarning')

BATCHES = 6


def package_of(name):
    """The names that a test needs of one of Lightning's two packages."""
    pl = importlib.import_module({'lightning': 'lightning.pytorch'}.get(name, name))
    ours = importlib.import_module(f'timm_dl2pa.integrations.{name}')
    callbacks = importlib.import_module(f'{pl.__name__}.callbacks')

    class Module(pl.LightningModule):
        def __init__(self, kill_at=None, result=None, **kwargs):
            super().__init__()
            self.model = tiny_model(**kwargs)
            self.kill_at, self.result = kill_at, result
            self.validated = []

        def training_step(self, batch, batch_idx):
            if self.current_epoch * BATCHES + batch_idx == self.kill_at:
                raise Killed
            images, labels = batch['image'] if self.result else batch[0], batch['y'] if self.result else batch[1]
            output = self.model(images)
            loss = torch.nn.functional.cross_entropy(output, labels)
            return self.result(self, loss, images, labels, output) if self.result else loss

        def validation_step(self, batch, batch_idx):
            head = self.model.get_classifier()
            assert not head.training
            self.validated.append((head.assignment.clone(), head.prototypes.clone(), self.model(batch[0])))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return SimpleNamespace(Module=Module, Trainer=pl.Trainer, Callback=ours.DL2PACallback, callbacks=callbacks, pl=pl)


@pytest.fixture(scope='module')
def lightning():
    return package_of('lightning')


class StatefulLoader:
    """A loader that goes on in the middle of an epoch, as that of torchdata does."""

    def __init__(self, loader):
        self.loader, self.given = loader, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        if self.given == len(self):  # of the epoch before
            self.given = 0
        for batch in list(self.loader)[self.given:]:
            self.given += 1
            yield batch

    def state_dict(self):
        return {'given': self.given}

    def load_state_dict(self, state):
        self.given = state['given']


def trainer_of(package, *callbacks, epochs=2, **kwargs):
    return package.Trainer(**{'max_epochs': epochs, 'accelerator': 'cpu', 'logger': False, 'callbacks': list(callbacks),
                              'enable_checkpointing': any(isinstance(callback, package.callbacks.ModelCheckpoint)
                                                          for callback in callbacks),
                              'enable_progress_bar': False, 'enable_model_summary': False, **kwargs})


def train(package, module, *callbacks, ckpt_path=None, validate=True, **kwargs):
    loader = StatefulLoader(DataLoader(tiny_data(), batch_size=4))
    trainer = trainer_of(package, *callbacks, **kwargs)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*AssignmentScheduler')
        trainer.fit(module, loader, DataLoader(tiny_data(8), batch_size=4) if validate else None, ckpt_path=ckpt_path)
    callback = next(callback for callback in callbacks if isinstance(callback, package.Callback))
    return outcome(module.model, callback.scheduler)


@pytest.mark.parametrize('name, options, checkpoint, kill_at, loop', [
    ('lightning', {}, {}, 6, {}),
    ('lightning', dict(warmup='none'), {}, 8, {}),
    ('pytorch_lightning', dict(recipe='even'), {}, 6, {}),
    # Saved in the validation after an epoch, whose end is not told yet.
    ('lightning', dict(warmup='none'), dict(save_on_train_epoch_end=False), 6, {}),
    # In the middle of an epoch; a quarter of an epoch's batches are accumulated.
    ('lightning', dict(warmup='none', interval=3), dict(every_n_train_steps=2), 10, dict(accumulate_grad_batches=2)),
    ('lightning', {}, dict(every_n_train_steps=2), 9, dict(val_check_interval=0.5)),
])
def test_resumes_to_the_bit(tmp_path, name, options, checkpoint, kill_at, loop):
    package = package_of(name)
    whole = train(package, package.Module(), package.Callback(**options), **loop)
    assert whole['scheduler']['clock']['batches'] == 2 * BATCHES and whole['scheduler']['clock']['epochs'] == 2
    assert len(whole['scheduler']['resolver']['history']) > 0

    saves = package.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename='{step}', **checkpoint)
    with pytest.raises(Killed):
        train(package, package.Module(kill_at=kill_at), package.Callback(**options), saves, **loop)
    last = max(tmp_path.glob('*.ckpt'), key=lambda path: path.stat().st_mtime_ns)
    resumed = train(package, package.Module(), package.Callback(**options), ckpt_path=last, **loop)
    assert same(whole, resumed)


def test_the_length_of_the_training_is_known(lightning):
    for expected, kwargs in ((12, {}), (5, dict(max_steps=5)), (6, dict(max_steps=3, accumulate_grad_batches=2)),
                             (4, dict(limit_train_batches=2))):
        callback = lightning.Callback()
        train(lightning, lightning.Module(), callback, validate=False, **kwargs)
        assert callback.scheduler.clock.total.count == expected
        assert callback.scheduler.steps == min(expected, 12)


def averages_of(lightning):
    return {
        'EMA': lightning.callbacks.EMAWeightAveraging(decay=0.9),
        'EMA without buffers': lightning.callbacks.EMAWeightAveraging(decay=0.9, use_buffers=False),
        'SWA': lightning.callbacks.WeightAveraging(),
        'EMA each epoch': lightning.callbacks.EMAWeightAveraging(
            decay=0.9, update_starting_at_step=10 ** 6, update_starting_at_epoch=0),
    }


@pytest.mark.parametrize('name', ['EMA', 'EMA without buffers', 'SWA'])
@pytest.mark.parametrize('first', [False, True])
def test_averages_of_weights_keep_the_assignment(tmp_path, lightning, name, first):
    """Whichever callback comes first; the labels move in the middle of the average."""
    def run(epochs, folder, **kwargs):
        module, callback = lightning.Module(), lightning.Callback(warmup='none', interval=2, total=12)
        average, seen = averages_of(lightning)[name], []

        class Watch(lightning.pl.Callback):
            def on_validation_start(self, trainer, pl_module):
                head = pl_module.model.get_classifier()
                seen.append((head.assignment.clone(), head.prototypes.clone()))

        saves = lightning.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename='{step}')
        order = (average, callback) if first else (callback, average)
        result = train(lightning, module, *order, Watch(), saves, epochs=epochs, num_sanity_val_steps=0, **kwargs)
        return module, callback, seen, result

    module, callback, seen, whole = run(2, tmp_path / 'whole')
    assert any(update.moved for update in callback.scheduler.history[1:])
    assert len(module.validated) == 2 * len(seen) == 4
    for number, (assignment, prototypes, _) in enumerate(module.validated):
        assert torch.equal(assignment, seen[number // 2][0]) and torch.equal(prototypes, seen[number // 2][1])
    # The trained model has the averaged weights, and classifies as the average did.
    assert torch.equal(module.model.eval()(tiny_batch()), module.validated[2][2])

    run(1, tmp_path / 'part')
    resumed = run(2, tmp_path / 'rest', ckpt_path=tmp_path / 'part' / 'step=6.ckpt')[3]
    assert same(whole, resumed)


@pytest.mark.parametrize('name', ['EMA', 'EMA without buffers', 'SWA', 'EMA each epoch'])
@pytest.mark.parametrize('first', [False, True])
def test_averages_leave_the_assignment_of_the_training(tmp_path, lightning, name, first):
    """Without validation; in each checkpoint too, whose weights are the averaged ones."""
    options = dict(warmup='none', interval=2, total=12)
    alone = lightning.Module()
    train(lightning, alone, lightning.Callback(**options), validate=False)
    module, callback, average = lightning.Module(), lightning.Callback(**options), averages_of(lightning)[name]
    saves = lightning.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename='{step}', every_n_train_steps=1)
    order = (average, callback) if first else (callback, average)
    train(lightning, module, *order, saves, validate=False)
    one, other = (each.model.get_classifier() for each in (alone, module))
    assert torch.equal(one.assignment, other.assignment) and torch.equal(one.prototypes, other.prototypes)
    checkpoints = [torch.load(path) for path in tmp_path.iterdir()]
    assert len(checkpoints) == 12
    for checkpoint in checkpoints:
        for key in ('model.fc.assignment', 'model.fc.prototypes'):
            assert torch.equal(checkpoint['state_dict'][key], checkpoint['current_model_state'][key])


def tiny_batch():
    return torch.stack([image for image, _ in tiny_data(8)[:4]])


def test_targets_may_come_from_the_step(lightning):
    """A batch of another kind, soft targets, several forwards: the step says what counts."""
    def result(module, loss, images, labels, output):
        module.model(images.flip(-1))
        return {'loss': loss, 'targets': torch.nn.functional.one_hot(labels, 7).float(), 'output': output}

    loader = [{'image': torch.stack([image for image, _ in part]), 'y': torch.tensor([label for _, label in part])}
              for part in (tiny_data()[:4], tiny_data()[4:8])]
    loader = DataLoader(loader, batch_size=None)
    module, callback = lightning.Module(result=result), lightning.Callback(warmup='none')
    trainer_of(lightning, callback, epochs=1, num_sanity_val_steps=0).fit(module, loader)
    assert callback.scheduler.steps == 2
    assert callback.scheduler.class_means.sums.norm(dim=1).gt(0).sum() == len({label for _, label in tiny_data()[:8]})
    callback = lightning.Callback()
    with pytest.raises(ValueError, match='must have one of pixel_values'):
        trainer_of(lightning, callback).fit(lightning.Module(result=lambda *values: values[1]), loader)


def test_takes_a_scheduler(lightning):
    module = lightning.Module()
    scheduler = AssignmentScheduler(module.model, interval=2, warmup='none')
    callback = lightning.Callback(scheduler)
    train(lightning, module, callback)
    assert callback.scheduler is scheduler and [update.step for update in scheduler.history] == [2, 4, 6, 8, 10]
    with pytest.raises(ValueError, match='of another model'):
        train(lightning, lightning.Module(), callback)
    module = lightning.Module()
    scheduler = AssignmentScheduler(module, interval=5)
    prime(module.model, DataLoader(tiny_data(), batch_size=4), scheduler, progress=False)
    train(lightning, module, lightning.Callback(scheduler))
    assert [update.event for update in scheduler.history] == ['resolve', 'resolve']  # primed: without a warm-up
    with pytest.raises(ValueError, match='interval: a scheduler that is given has these'):
        lightning.Callback(scheduler, interval=2)
    with pytest.raises(TypeError, match='scheduler must be an AssignmentScheduler, not Linear'):
        lightning.Callback(torch.nn.Linear(1, 1))


def test_trains_one_model_after_another(lightning):
    callback = lightning.Callback(interval=4)
    first = train(lightning, lightning.Module(), callback)
    assert same(first, train(lightning, lightning.Module(), callback))


def test_resolves_are_logged_where_asked(lightning):
    rows = []

    class Logger(lightning.pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            if any(name.startswith('dl2pa') for name in metrics):
                rows.append((step, metrics))

    train(lightning, lightning.Module(), lightning.Callback(), logger=Logger())
    assert not rows
    callback = lightning.Callback(warmup='none', interval=4, log=True)
    train(lightning, lightning.Module(), callback, logger=Logger(), accumulate_grad_batches=2)
    assert [step for step, _ in rows] == [2, 4]
    assert rows[0][1]['dl2pa/resolve/objective'] == callback.scheduler.history[0].objective


def ranks_train(rank, folder):
    as_launched(rank)
    package = package_of('lightning')

    def run(kill_at=None, ckpt_path=None):
        module, callback = package.Module(kill_at), package.Callback(interval=4)
        average = package.callbacks.EMAWeightAveraging(decay=0.9)
        saves = package.callbacks.ModelCheckpoint(folder, save_top_k=-1, filename='{step}')
        trainer = trainer_of(package, callback, average, saves, strategy='ddp', devices=2)
        trainer.fit(module, DataLoader(tiny_data(48), batch_size=4), ckpt_path=ckpt_path)
        assert trainer.world_size == 2 and callback.scheduler.steps == 2 * BATCHES
        return outcome(module.model, callback.scheduler)

    whole = run()
    with pytest.raises(Killed):
        run(kill_at=8)
    torch.save((whole, run(ckpt_path=f'{folder}/step=6.ckpt')), f'{folder}/{rank}.pt')


@pytest.mark.slow
def test_two_processes_agree_and_resume(tmp_path):
    run_ranks(ranks_train, str(tmp_path), folder=tmp_path)
    (whole, resumed), (other, other_resumed) = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    for name in ('assignment', 'prototypes'):
        key = next(key for key in whole['model'] if key.endswith(name))
        assert torch.equal(whole['model'][key], other['model'][key])
    assert whole['scheduler']['resolver']['history'] == other['scheduler']['resolver']['history']
    # Each process has its own running statistics of batch norm until it resumes, with rank 0's.
    for outcome_of_rank_1 in (other, other_resumed):
        outcome_of_rank_1['model'] = {name: value for name, value in outcome_of_rank_1['model'].items()
                                      if 'running' not in name}
    assert same(whole, resumed) and same(other, other_resumed)
