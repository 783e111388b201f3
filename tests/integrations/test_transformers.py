"""transformers: TimmWrapper models that save and load a head, and the Trainer with one callback."""
import pytest
import timm
import torch

from tests.helpers.integrations import CLASSES, DIM, SIZE, Killed, as_launched, outcome, same, tiny_data
from tests.helpers.processes import run_ranks
from timm_dl2pa import AssignmentScheduler, save_model, wrap_dl2pa
from timm_dl2pa.head.averages import digits_of

transformers = pytest.importorskip('transformers', reason='needs transformers: pip install "timm-dl2pa[transformers]"')

from transformers import (  # noqa: E402
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from timm_dl2pa.integrations.transformers import DL2PACallback, record_head  # noqa: E402

BATCHES = 6


def changed(model):
    """As a training leaves it: other prototypes, labels and scale."""
    head = model.get_classifier()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        head.assign(torch.randperm(len(head.prototypes), generator=generator)[:head.num_classes],
                    torch.nn.functional.normalize(torch.randn(head.prototypes.shape, generator=generator)))
        if hasattr(head, 'log_scale'):
            head.log_scale += 0.3
    return model.eval()


def wrapped_inside(architecture='test_resnet', model_args=None, **kwargs):
    """A TimmWrapper model of a plain timm model, whose classifier is replaced afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TimmWrapperForImageClassification(TimmWrapperConfig(
            architecture=architecture, model_args=model_args, num_labels=CLASSES))
        wrap_dl2pa(model.timm_model, DIM, **kwargs)
    return model


def from_config(**kwargs):
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture='dl2pa', num_labels=CLASSES, model_args={
        'dl2pa_backbone': 'test_resnet', 'dl2pa_dim': DIM, **kwargs}))


def recorded(*args, **kwargs):
    model = wrapped_inside(*args, **kwargs)
    record_head(model)
    return model


@pytest.mark.parametrize('make', [
    from_config, recorded,
    lambda: from_config(dl2pa_recipe='paper', dl2pa_scale=7.5),
    lambda: recorded('test_vit', dict(img_size=SIZE), recipe='paper', num_prototypes=9),
])
def test_loaded_model_gives_the_same_logits(tmp_path, make, refuse_prototypes):
    model = make()
    timm_model = changed(model.timm_model)
    images = torch.randn(4, 3, SIZE, SIZE)
    expected = model.eval()(images).logits
    model.save_pretrained(tmp_path)
    refuse_prototypes()  # a load takes them from the file
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.allclose(loaded(images).logits, expected, atol=1e-5)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    head, again = timm_model.get_classifier(), loaded.timm_model.get_classifier()
    assert again.config == head.config
    # What no file has: the copy of the assignment that averages go over.
    assert torch.equal(again.averaged_assignment, digits_of(head.assignment))
    save_model(loaded.timm_model, tmp_path / 'timm', model_args=None if 'resnet' in str(type(timm_model)).lower()
               else dict(img_size=SIZE))


def test_a_saved_timm_model_is_one_of_transformers(tmp_path):
    """What `save_model` writes, and the Hub has, is loaded as it is; so is what transformers then saves."""
    model = changed(wrap_dl2pa(timm.create_model('test_resnet', num_classes=CLASSES, in_chans=1), DIM))
    names = [f'class {index}' for index in range(CLASSES)]
    save_model(model, tmp_path / 'timm', model_args=dict(in_chans=1), label_names=names)
    images = torch.randn(4, 1, SIZE, SIZE)
    for folder in ('timm', 'transformers'):
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / folder)
        assert torch.allclose(loaded(images).logits, model(images), atol=1e-5)
        assert list(loaded.config.id2label.values()) == names
        loaded.save_pretrained(tmp_path / 'transformers')


def test_models_without_a_head_are_refused():
    model = TimmWrapperForImageClassification(TimmWrapperConfig(architecture='test_resnet', num_labels=CLASSES))
    with pytest.raises(ValueError, match='must have a timm model with a DL2PA head'):
        record_head(model)
    with pytest.raises(ValueError, match='must have a timm model with a DL2PA head'):
        record_head(torch.nn.Linear(1, 1))


def train(folder, callback, *, model=None, resume=None, kill_at=None, loss=None, **kwargs):
    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == kill_at:
                raise Killed

    model = wrapped_inside() if model is None else model
    arguments = transformers.TrainingArguments(str(folder), **{
        'num_train_epochs': 2, 'per_device_train_batch_size': 4, 'use_cpu': True, 'report_to': [], 'logging_steps': 100,
        'save_strategy': 'epoch', 'eval_strategy': 'epoch', 'disable_tqdm': True, 'learning_rate': 0.01, **kwargs})
    data = [{'pixel_values': image, 'labels': label} for image, label in tiny_data()]
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:8], compute_loss_func=loss,
                                   callbacks=[callback, Kill()])
    trainer.train(resume_from_checkpoint=resume)
    return {**outcome(model.timm_model, callback.scheduler), 'log': trainer.state.log_history}


def without_times(result):
    """The outcome with what the log has of re-solves: of evaluations, one is not repeated after resuming."""
    return {**result, 'log': [{name: value for name, value in row.items() if 'seconds' not in name}
                              for row in result['log'] if any(name.startswith('dl2pa') for name in row)]}


@pytest.mark.parametrize('options, arguments, kill_at', [
    ({}, {}, 7),
    (dict(warmup='none'), {}, 8),
    (dict(warmup='none', interval=4), dict(gradient_accumulation_steps=2), 4),
    # Saved at the last step of an epoch, whose end is not told yet; and in the middle of one.
    (dict(warmup='none'), dict(save_strategy='steps', save_steps=6), 7),
    (dict(recipe='even'), dict(save_strategy='steps', save_steps=4), 9),
])
def test_resumes_to_the_bit(tmp_path, options, arguments, kill_at, recwarn):
    whole = train(tmp_path / 'whole', DL2PACallback(**options), **arguments)
    assert whole['scheduler']['clock']['batches'] == 2 * BATCHES and whole['scheduler']['clock']['epochs'] == 2
    assert whole['scheduler']['resolver']['history']
    with pytest.raises(Killed):
        train(tmp_path / 'killed', DL2PACallback(**options), kill_at=kill_at, **arguments)
    resumed = train(tmp_path / 'killed', DL2PACallback(**options), resume=True, **arguments)
    assert same(without_times(whole), without_times(resumed))
    assert not [warning for warning in recwarn if 'AssignmentScheduler' in str(warning.message)]
    loaded = AutoModelForImageClassification.from_pretrained(sorted((tmp_path / 'killed').iterdir())[0])
    assert type(loaded.timm_model.get_classifier()).__name__ == 'DL2PAHead'


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    with pytest.raises(Killed):
        train(tmp_path / 'first', DL2PACallback(), kill_at=7)
    moved = (tmp_path / 'first' / 'checkpoint-6').rename(tmp_path / 'elsewhere')
    with pytest.raises(FileNotFoundError, match=r'has no dl2pa_scheduler.pt.*resume_from'):
        train(tmp_path / 'second', DL2PACallback(), resume=str(moved))
    train(tmp_path / 'third', DL2PACallback(resume_from=moved), resume=str(moved))
    state = torch.load(moved / 'dl2pa_scheduler.pt')
    torch.save({**state, 'global_step': 3}, moved / 'dl2pa_scheduler.pt')
    with pytest.raises(ValueError, match='is of step 3, and training resumes from step 6'):
        train(tmp_path / 'fourth', DL2PACallback(resume_from=moved), resume=str(moved))


def test_a_loss_that_takes_the_labels_tells_them(tmp_path):
    callback = DL2PACallback()

    def loss(outputs, labels, num_items_in_batch=None):
        callback.step(labels)
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    train(tmp_path, callback, loss=loss)
    assert callback.scheduler.steps == 2 * BATCHES
    with pytest.raises(ValueError, match=r'the forward of the model got no labels.*callback\.step'):
        train(tmp_path / 'smoothed', DL2PACallback(), label_smoothing_factor=0.1)


def test_resolves_are_logged(tmp_path):
    rows = []
    callback = DL2PACallback(warmup='none', interval=4, writer=lambda values, step: rows.append((step, values)))
    log = train(tmp_path, callback, save_strategy='no')['log']
    assert [step for step, _ in rows] == [5, 9]
    assert [row['step'] for row in log if 'dl2pa/resolve/moved' in row] == [5, 9]
    assert not (tmp_path / 'checkpoint-6').exists()


def test_takes_a_scheduler(tmp_path):
    model = wrapped_inside()
    scheduler = AssignmentScheduler(model, interval=5, warmup='none')
    train(tmp_path, DL2PACallback(scheduler), model=model)
    assert [update.step for update in scheduler.history] == [5, 10]
    assert not model._forward_pre_hooks  # nothing stays behind
    with pytest.raises(ValueError, match='of another model'):
        train(tmp_path, DL2PACallback(scheduler))


def ranks_train(rank, folder):
    as_launched(rank)
    callback = DL2PACallback(warmup='none', interval=2, total=6)
    result = without_times(train(f'{folder}/out', callback, ddp_backend='gloo'))
    resumed = DL2PACallback(warmup='none', interval=2, total=6)
    again = without_times(train(f'{folder}/out', resumed, resume=f'{folder}/out/checkpoint-3', ddp_backend='gloo'))
    torch.save((result, again), f'{folder}/{rank}.pt')


@pytest.mark.slow
def test_two_processes_agree_and_resume(tmp_path):
    run_ranks(ranks_train, str(tmp_path), folder=tmp_path)
    (whole, resumed), (other, other_resumed) = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert whole['scheduler']['clock']['batches'] == 6 and len(whole['scheduler']['resolver']['history']) == 2
    assert torch.equal(whole['model']['fc.assignment'], other['model']['fc.assignment'])
    assert same(whole['model'], resumed['model']) and same(other['model'], other_resumed['model'])


