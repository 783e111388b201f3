"""A head that is taken over from another model: what is copied, what is pinned, and that a gallery is found by it."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from timm_dl2pa import (
    AssignmentScheduler,
    DL2PAHead,
    load_head,
    load_model,
    prime,
    save_model,
    wrap_dl2pa,
)
from timm_dl2pa.options import named_as_options

pytestmark = [pytest.mark.timm, pytest.mark.filterwarnings('ignore:head takes .* features')]

CLASSES = 6


def create(name='test_resnet', **kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return timm.create_model(name, **{'num_classes': CLASSES, **kwargs})


@pytest.fixture
def old():
    """A model whose prototypes and labels have moved, and whose scale was trained."""
    model = wrap_dl2pa(create(), 8, num_prototypes=9)
    head = model.get_classifier()
    head.assign(torch.tensor([3, 1, 8, 0, 5, 2]), F.normalize(torch.randn(9, 8), dim=1))
    with torch.no_grad():
        head.log_scale += 0.5
    return model


def geometry(model):
    head = model.get_classifier()
    return head.prototypes.clone(), head.assignment.clone()


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other))


def test_prototypes_assignment_and_scale_are_those_of_the_old_model(old, tmp_path):
    head = old.get_classifier()
    for source in (old, head, head.save_pretrained(tmp_path)):
        with pytest.warns(UserWarning, match='VisionTransformer takes 64: its neck is new') as said:
            new = wrap_dl2pa(create('test_vit', img_size=32, num_classes=1000), head=source)
        assert said[0].filename == __file__
        taken = new.get_classifier()
        assert same(geometry(new), geometry(old)) and taken.current_scale() == head.current_scale()
        assert (taken.in_features, new.num_classes, taken.config.pinned, taken.config.recipe) == (64, 6, True, 'placed')
        assert taken.prototypes.data_ptr() != head.prototypes.data_ptr() and not head.config.pinned
    # A backbone of the same width gets the neck too.
    again = wrap_dl2pa(create(), head=old).get_classifier()
    assert torch.equal(again.neck[0].weight, head.neck[0].weight) and again.config.pinned


def test_each_classifier_of_a_model_gets_its_own():
    name, kwargs = 'deit_tiny_distilled_patch16_224', dict(img_size=32, depth=1)
    old = wrap_dl2pa(create(name, **kwargs), 8)
    torch.nn.init.normal_(old.head_dist.neck[0].weight)
    new = wrap_dl2pa(create(name, **kwargs), head=old)
    for path in ('head', 'head_dist'):
        assert torch.equal(getattr(new, path).neck[0].weight, getattr(old, path).neck[0].weight)
    assert all(head.config.pinned for head in new.get_classifier())
    lone = wrap_dl2pa(create(), 8)
    both = wrap_dl2pa(create(name, **kwargs), head=lone)
    assert same([both.head.prototypes, both.head_dist.prototypes], [lone.get_classifier().prototypes] * 2)


def test_layers_of_the_old_classifier_stay_with_the_old_model():
    """LeViT's batch norm stands before its linear layer; another backbone of the same width has none."""
    old = wrap_dl2pa(create(), 8)
    old.get_classifier().before = torch.nn.BatchNorm1d(96)
    new = wrap_dl2pa(create(), head=old)
    assert isinstance(new.get_classifier().before, torch.nn.Identity)


def test_what_has_no_head_is_refused_and_nothing_changed(old):
    model = create()
    for arguments, message in ((dict(head=create()), 'head is a ResNet that has no DL2PAHead'),
                               (dict(head=old, dim=4), 'dim cannot be given together with head'),
                               (dict(head=old, pinned=1), 'pinned must be bool, not 1')):
        with pytest.raises(ValueError, match=message):
            wrap_dl2pa(model, **arguments)
        assert isinstance(model.fc, torch.nn.Linear)
    with pytest.raises(ValueError, match=r"neck='none'.*64, not 96"):
        wrap_dl2pa(create('test_vit', img_size=32), head=DL2PAHead(96, CLASSES, 96, neck='none'))


# --- pinned

IMAGES, LABELS = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(12) % CLASSES


def trained(model, scheduler, steps=6):
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    model.train()
    for _ in range(steps):
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step(LABELS)
    scheduler.epoch_end()
    return model


@pytest.mark.parametrize('recipe', ['placed', 'even', 'paper'])
def test_no_training_changes_a_pinned_head(recipe):
    old = wrap_dl2pa(create(), 8, recipe=recipe)
    new = wrap_dl2pa(create(), head=old)
    scheduler = AssignmentScheduler(new, interval=2, total=6)
    assert not scheduler.warming_up and scheduler.stop == 0
    trained(new, scheduler)
    assert same(geometry(new), geometry(old)) and not scheduler.history
    free = wrap_dl2pa(create(), head=old, pinned=False)
    scheduler = AssignmentScheduler(free, interval=2, total=6)
    assert scheduler.warming_up == (recipe != 'paper')


def test_a_warm_up_and_re_solves_are_refused_with_the_remedy(old):
    new = wrap_dl2pa(create(), head=old)
    for arguments in (dict(warmup='placed'), dict(warmup='rotated'), dict(stop=100)):
        name, value = next(iter(arguments.items()))
        with pytest.raises(ValueError, match=rf'^{name}={value!r} would change .* pinned=False'):
            AssignmentScheduler(new, **arguments)
    AssignmentScheduler(new, warmup='none', stop=0)
    # The remedy that it names.
    before = geometry(new)
    wrap_dl2pa(new, head=new, pinned=False)
    assert AssignmentScheduler(new, warmup='placed').warming_up and same(geometry(new), before)
    moving = AssignmentScheduler(wrap_dl2pa(create(), 8), interval=2)
    with pytest.raises(ValueError, match="of the warm-up 'placed', and this scheduler has none"):
        AssignmentScheduler(wrap_dl2pa(create(), head=old)).load_state_dict(moving.state_dict())


def test_the_scripts_say_the_option_by_its_name(old):
    """Their scheduler gets the options of the command line."""
    with pytest.raises(ValueError, match=r'^dl2pa_warmup='), named_as_options():
        AssignmentScheduler(wrap_dl2pa(create(), head=old), warmup='placed')


@pytest.mark.parametrize('neck', ['linear_bn', 'none'])
def test_prime_sets_the_neck_of_a_pinned_head_alone(neck):
    dim = 8 if neck == 'linear_bn' else 24
    old = DL2PAHead(24, 12, dim, neck=neck)
    centres = torch.randn(12, 24, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(12).repeat(20)
    x = centres[labels] + 0.2 * torch.randn(240, 24, generator=torch.Generator().manual_seed(2))
    moved = copy.deepcopy(old)
    prime(moved, [(x, labels)], progress=False)
    assert not torch.equal(moved.prototypes, old.prototypes)
    pinned = copy.deepcopy(old)
    pinned.config = type(old.config)(**{**vars(old.config), 'pinned': True})
    accuracy = prime(pinned, [(x, labels)], progress=False)
    assert same([pinned.prototypes, pinned.assignment], [old.prototypes, old.assignment])
    assert neck == 'none' or accuracy > 0.9


def test_a_scale_that_prime_has_set_is_held_with_its_neck(old, tmp_path):
    old.get_classifier().hold_scale(9.0)
    for loaded in (load_model(save_model(old, tmp_path)), timm.create_model(f'local-dir:{tmp_path}', pretrained=True),
                   wrap_dl2pa(create(), head=old)):
        head = loaded.get_classifier()
        assert head.config.held_scale == 9 and head.current_scale().item() == pytest.approx(9)
    with pytest.warns(UserWarning, match='its neck is new'):
        new = wrap_dl2pa(create('test_vit', img_size=32), head=old).get_classifier()
    assert new.config.held_scale is None and new.current_scale().item() == pytest.approx(9)


def test_pinned_is_saved_and_loaded(old, tmp_path):
    new = wrap_dl2pa(create(), head=old)
    folder = save_model(new, tmp_path / 'model')
    for loaded in (load_model(folder), timm.create_model(f'local-dir:{folder}', pretrained=True)):
        assert loaded.get_classifier().config.pinned and not AssignmentScheduler(loaded).warming_up
    assert load_head(new.get_classifier().save_pretrained(tmp_path / 'head')).config.pinned
    assert copy.deepcopy(new).get_classifier().config.pinned
    # Of other classes prototypes and assignment are new.
    new.reset_classifier(4)
    assert not new.get_classifier().config.pinned
    with pytest.warns(UserWarning, match='prototypes and assignment are new'):
        other = wrap_dl2pa(create(), head=old, num_classes=4)
    assert not other.get_classifier().config.pinned
    with pytest.warns(UserWarning, match='prototypes and assignment are new'):
        assert not load_model(folder, num_classes=4).get_classifier().config.pinned


def test_two_models_may_be_pinned_to_the_same_points_from_the_start():
    one, other = (wrap_dl2pa(create(), 8, recipe='even', pinned=True) for _ in range(2))
    assert same(geometry(one), geometry(other)) and not AssignmentScheduler(one).warming_up
    assert not wrap_dl2pa(create(), 8).get_classifier().config.pinned


def test_new_queries_find_the_old_gallery():
    """Of two "backbones" of other widths: an inherited head finds it, one that is primed alone does not."""
    centres = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(10).repeat(20)

    def features(seed, width):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(24, width, generator=torch.Generator().manual_seed(width)) / 5
        return (centres[labels] + 0.5 * torch.randn(200, 24, generator=generator)) @ mix

    def recall(queries, gallery):
        found = labels[(queries @ gallery.t()).argmax(dim=1)]
        return (found == labels).double().mean().item()

    torch.manual_seed(0)
    old = wrap_dl2pa(create(num_classes=10), 8)  # 96 features
    prime(old.get_classifier(), [(features(1, 96), labels)], progress=False)
    gallery = old.get_classifier().eval().embed(features(3, 96))
    found = []
    for head in (wrap_dl2pa(create('test_vit', img_size=32), head=old), wrap_dl2pa(create('test_vit', img_size=32,
                                                                                          num_classes=10), 8)):
        head = head.get_classifier()
        prime(head, [(features(2, 64), labels)], progress=False)
        found.append(recall(head.eval().embed(features(4, 64)), gallery))
    assert found[0] > 0.9 and found[1] < 0.6
