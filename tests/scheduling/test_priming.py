import copy
import sys

import pytest
import torch
import torch.nn as nn

from timm_dl2pa import AssignmentScheduler, DL2PAHead, load_head, prime
from timm_dl2pa.scheduling import neck_fit, prime_fit
from timm_dl2pa.scheduling.backbone_modes import BackboneModes
from timm_dl2pa.scheduling.discriminant import Moments, fit_discriminant
from timm_dl2pa.scheduling.feature_sums import FeatureSums
from timm_dl2pa.scheduling.priming import Primer

CLASSES, FEATURES = 20, 24


class Model(nn.Module):
    """A "backbone" that is a fixed, badly conditioned, off-centre map."""

    def __init__(self, dim, neck='linear', heads=1, recipe='placed'):
        super().__init__()
        self.mix = nn.Linear(FEATURES, FEATURES)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.mix.weight.copy_(torch.randn(FEATURES, FEATURES) / 5)
            self.mix.bias.copy_(2 + torch.randn(FEATURES))
            self.heads = nn.ModuleList([DL2PAHead(FEATURES, CLASSES, dim, neck=neck, recipe=recipe)
                                        for _ in range(heads)])

    def forward(self, x):
        features = self.mix(x)
        return next(iter([head(features) for head in self.heads]))


def _centres():
    fixed = torch.Generator().manual_seed(99)
    return (2 * torch.randn(4, FEATURES, generator=fixed))[torch.arange(CLASSES) % 4] \
        + torch.randn(CLASSES, FEATURES, generator=fixed)


CENTRES = _centres()


def batches(number, rows=64, seed=0, spread=1.0):
    """Classes in four families."""
    centres = CENTRES
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        labels = torch.randint(0, CLASSES, (rows,), generator=generator)
        yield centres[labels] + spread * torch.randn(rows, FEATURES, generator=generator), labels


def fitted(model, loader):
    """The discriminant that `prime` makes of these samples."""
    sums = FeatureSums(model.heads[0], -100)
    with torch.no_grad():
        for x, labels in loader:
            sums.add(model.mix(x), labels)
    return fit_discriminant(Moments.of(sums.counts, sums.sums, sums.squares), sums.samples, sums.labels)


def accuracy(model, x, labels):
    return (model.eval()(x).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize('neck', ['linear', 'linear_bn'])
def test_a_primed_head_is_as_good_as_the_nearest_class_mean(neck):
    model = Model(CLASSES - 1, neck)
    (train, train_labels), (test, labels) = next(batches(1, 4000)), next(batches(1, 2000, seed=1))
    with torch.no_grad():
        features, tested = model.mix(train), model.mix(test)
    means = torch.stack([features[train_labels == label].mean(0) for label in range(CLASSES)])
    nearest = (torch.cdist(tested, means).argmin(1) == labels).double().mean().item()
    assert accuracy(model, test, labels) < 0.2
    prime(model, [(train, train_labels)], progress=False)
    assert 0.5 < nearest < accuracy(model, test, labels) + 0.02


def nearest_mean(features, labels, tested, tested_labels):
    means = torch.stack([features[labels == label].mean(0) for label in range(CLASSES)])
    return (torch.cdist(tested, means).argmin(1) == tested_labels).double().mean().item()


@pytest.mark.parametrize('mix', [True, False])
@pytest.mark.parametrize('rows', [100, 1000])
@pytest.mark.parametrize('dim', [6, 10, CLASSES - 1, 40])
def test_it_holds_up_against_the_nearest_class_mean(dim, rows, mix):
    """With few samples and many, where directions matter and where they are all alike. In few dimensions against the
    nearest class mean after a linear discriminant analysis."""
    model = Model(dim, 'linear_bn')
    if not mix:
        nn.init.eye_(model.mix.weight)
    (train, train_labels), (test, labels) = next(batches(1, rows)), next(batches(1, 2000, seed=1))
    train_labels[:CLASSES], train[:CLASSES] = torch.arange(CLASSES), CENTRES
    with torch.no_grad():
        features, tested = model.mix(train).double(), model.mix(test).double()
    if dim < CLASSES - 1:
        found = fitted(model, [(train, train_labels)])
        moments = found.rows  # (C, F), in the metric of the covariance
        basis = torch.linalg.svd(moments - moments.mean(0), full_matrices=False)[2][:dim]
        features, tested = features @ basis.t(), tested @ basis.t()
    prime(model, [(train, train_labels)], progress=False)
    assert accuracy(model, test, labels) > nearest_mean(features, train_labels, tested, labels) - 0.06


def test_nothing_is_aligned_where_prototypes_are_a_simplex(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError('aligned')

    monkeypatch.setattr(prime_fit, 'align_prototypes', refuse)
    for recipe in ('placed', 'even'):
        model = Model(CLASSES - 1, recipe=recipe)
        before = model.heads[0].prototypes.clone()
        prime(model, batches(10), progress=False)
        assert torch.equal(model.heads[0].prototypes, before)
        assert model.heads[0].assignment.tolist() == list(range(CLASSES))
        # The head classifies as the discriminant analysis does.
        x, _ = next(batches(1, 500, seed=1))
        found = fitted(model, batches(10))
        with torch.no_grad():
            scores = (model.mix(x).double() - found.centre) @ found.rows.t()
            assert torch.equal(model.eval()(x).argmax(1), scores.argmax(1))
    with pytest.raises(AssertionError, match='aligned'):
        prime(Model(6, recipe='even'), batches(10), progress=False)


def test_the_recipe_decides_whether_prototypes_are_placed_or_rotated():
    even, placed = Model(6, recipe='even'), Model(6, recipe='placed')
    spread = torch.pdist(even.heads[0].prototypes).sort().values
    for model in (even, placed):
        prime(model, batches(20), progress=False)
    assert torch.allclose(torch.pdist(even.heads[0].prototypes).sort().values, spread, atol=1e-5)
    assert not torch.allclose(torch.pdist(placed.heads[0].prototypes).sort().values, spread, atol=0.05)
    x, labels = next(batches(1, 1000, seed=1))
    assert accuracy(placed, x, labels) > accuracy(even, x, labels) - 0.02


def test_a_learned_scale_fits_samples_that_are_left_out():
    for spread, low, high in ((0.3, 18, 41), (3.0, 3, 14)):
        model = Model(CLASSES - 1, 'linear_bn')
        prime(model, batches(10, spread=spread), progress=False)
        assert low < model.heads[0].current_scale().item() < high
    model.heads[0] = DL2PAHead(FEATURES, CLASSES, CLASSES - 1, scale=7.0)
    prime(model, batches(10), progress=False)
    assert model.heads[0].current_scale().item() == 7.0


def trained(model, optimizer, scheduler):
    """The scale before and after some steps of training, on samples that were seen."""
    before = model.heads[0].current_scale().item()
    for x, labels in batches(20):
        nn.functional.cross_entropy(model.train()(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        scheduler.step(labels)
    return before, model.heads[0].current_scale().item()


@pytest.mark.parametrize('optimiser', [
    lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, weight_decay=1e-3),
    lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.1)])
def test_training_leaves_the_scale_as_it_was_set(optimiser):
    """Neither the gradient, nor weight decay, nor what the optimiser remembers of a training before changes it."""
    model = Model(6, 'linear_bn')
    optimizer, scheduler = optimiser(model.heads.parameters()), AssignmentScheduler(model)
    before, after = trained(model, optimizer, scheduler)
    assert abs(after - before) > 0.05
    prime(model, batches(20), scheduler, progress=False)
    before, after = trained(model, optimizer, scheduler)
    assert after == pytest.approx(before, rel=1e-6)
    # Not None: DistributedDataParallel waits for a gradient of each parameter.
    assert model.heads[0].log_scale.grad.item() == 0


def test_a_scale_that_was_set_is_so_after_saving_and_resuming(tmp_path):
    model = Model(6, 'linear_bn')
    scheduler = AssignmentScheduler(model)
    prime(model, batches(20), scheduler, progress=False)
    resumed = Model(6, 'linear_bn')
    resumed.load_state_dict(model.state_dict())
    again = AssignmentScheduler(resumed)
    assert resumed.heads[0].config.held_scale is None
    state = scheduler.state_dict()
    for held_scales, message in ((None, 'held_scales must be list'), ([1e9], 'scale must be between'),
                                 ([9.0, 9.0], 'with 2 DL2PA heads, not 1')):
        with pytest.raises(ValueError, match=message):
            again.load_state_dict({**state, 'held_scales': held_scales})
        assert again.warming_up and resumed.heads[0].config.held_scale is None
    again.load_state_dict(state)
    saved = load_head(model.heads[0].save_pretrained(tmp_path))
    for head in (resumed.heads[0], saved, copy.deepcopy(model).heads[0]):
        assert head.config.held_scale == pytest.approx(head.current_scale().item())
        head.current_scale().backward()
        assert head.log_scale.grad.item() == 0
    assert model.heads[0].with_classes(5).config.held_scale is None
    saved.hold_scale(None)
    saved.log_scale.grad = None
    saved.current_scale().backward()
    assert saved.log_scale.grad.item() > 0


def after_an_epoch(neck, optimiser):
    """Accuracy before and after an epoch in which the primed head alone is trained."""
    model = Model(CLASSES - 1, neck).requires_grad_(False)
    model.heads[0].requires_grad_(True)
    loader, (x, labels) = list(batches(20, rows=64, spread=1.5)), next(batches(1, 4000, seed=1, spread=1.5))
    prime(model, loader, progress=False)
    before, optimizer = accuracy(model, x, labels), optimiser(model.heads[0].parameters())
    for images, targets in loader:
        nn.functional.cross_entropy(model.train()(images), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, accuracy(model, x, labels)


@pytest.mark.parametrize('optimiser', [lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
                                       lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)])
@pytest.mark.parametrize('neck', ['linear', 'linear_bn'])
def test_training_does_not_undo_it(neck, optimiser, monkeypatch):
    """At the learning rates of a new classifier: a primed neck turns slowly."""
    before, after = after_an_epoch(neck, optimiser)
    assert after > before - 0.03
    monkeypatch.setattr(neck_fit, '_LENGTH', 0.3)
    assert after_an_epoch(neck, optimiser)[1] < before - 0.03


def test_priming_again_does_not_lengthen_a_neck():
    model = Model(CLASSES - 1, 'linear')
    lengths = []
    for _ in range(2):
        prime(model, batches(10), progress=False)
        lengths.append(model.heads[0].neck.weight.norm().item())
    assert lengths[1] == pytest.approx(lengths[0], rel=1e-3)


def test_a_primed_head_can_be_made_half():
    """Its variances, which grow with the square of its length, stay within float16, however few dimensions have them.
    """
    head, labels = DL2PAHead(64, 10, 512, prototypes=torch.eye(512)[:10]), torch.arange(10).repeat(40)
    x = 3 * torch.eye(64)[labels] + 0.1 * torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    prime(head, [(x, labels)], progress=False)
    found = head.eval()(x)
    assert (found.argmax(1) == labels).all()
    with torch.no_grad():
        half = head.half()(x.half())
    assert head.neck[1].running_var.isfinite().all() and torch.allclose(half, found, atol=0.2)


class Normalised(Model):
    """Its features are others in training mode: batch norm whose statistics are of other data."""

    def __init__(self, dim, neck='linear_bn'):
        super().__init__(dim, neck)
        self.norm = nn.BatchNorm1d(FEATURES)
        generator = torch.Generator().manual_seed(1)
        self.norm.running_mean.copy_(2 + 0.7 * torch.randn(FEATURES, generator=generator))
        self.norm.running_var.copy_(4 * torch.rand(FEATURES, generator=generator) + 0.5)
        self.drop = nn.Dropout(0.02)

    def forward(self, x):
        return self.heads[0](torch.relu(self.drop(self.norm(self.mix(x)))))


def test_the_first_step_of_training_sees_what_was_primed(monkeypatch):
    """Where the backbone's batch norms train, features are others than in evaluation mode."""
    loader = list(batches(20, rows=64))

    def losses():
        model = Normalised(CLASSES - 1).train()
        buffers, random = copy.deepcopy(model.norm.state_dict()), torch.get_rng_state()
        prime(model, loader, progress=False)
        assert all(torch.equal(value, buffers[name]) for name, value in model.norm.state_dict().items())
        assert torch.equal(random, torch.get_rng_state()) and model.norm.training and model.drop.training
        with torch.no_grad():
            found = [sum(nn.functional.cross_entropy(model(x), labels).item() for x, labels in loader) / len(loader)
                     for model in (copy.deepcopy(model).train(), model.eval())]
        return found

    in_training, in_evaluation = losses()
    assert in_training < in_evaluation + 0.25
    monkeypatch.setattr(BackboneModes, 'differ', lambda *_: False)
    alone = losses()
    assert alone[0] > in_training + 0.3  # by evaluation mode alone


def test_a_backbone_that_is_the_same_in_both_modes_runs_once():
    model, seen = Model(6).train(), []
    model.mix.register_forward_hook(lambda *_: seen.append(1))
    prime(model, batches(5), progress=False)
    assert len(seen) == 6  # the first batch tells
    model.eval()
    prime(model, batches(5), progress=False)
    assert len(seen) == 11


def test_classes_that_look_alike_stand_close():
    model = Model(4)
    share = prime(model, batches(30), progress=False)
    prototypes = model.heads[0].class_prototypes
    cosines = prototypes @ prototypes.t()
    family = torch.arange(CLASSES) % 4
    same = (family.unsqueeze(0) == family.unsqueeze(1)) & ~torch.eye(CLASSES, dtype=bool)
    assert cosines[same].mean() > 0.2 > 0 > cosines[family.unsqueeze(0) != family.unsqueeze(1)].mean()
    assert 0.1 < share < 1


@pytest.mark.parametrize('recipe', ['placed', 'even'])
@pytest.mark.parametrize('neck', ['linear', 'none'])
def test_it_returns_the_accuracy_of_samples_that_are_left_out(recipe, neck):
    model = Model(FEATURES if neck == 'none' else 6, neck, recipe=recipe)
    found = prime(model, batches(8, rows=60, spread=1.5), progress=False)
    x, labels = next(batches(1, 4000, seed=1, spread=1.5))
    assert found == pytest.approx(accuracy(model, x, labels), abs=0.08)
    trained, trained_labels = zip(*batches(8, rows=60, spread=1.5))
    if neck == 'linear':
        assert accuracy(model, torch.cat(trained), torch.cat(trained_labels)) > found + 0.02


def test_the_scheduler_goes_on_without_a_warmup_and_labels_stay():
    model = Model(6)
    scheduler = AssignmentScheduler(model, interval=2)
    assert scheduler.warming_up
    prime(model, batches(30), scheduler, progress=False)
    assert not scheduler.warming_up and model.heads[0].training_view.class_vectors is None
    assert not scheduler.class_means.sums.any()
    before = model.heads[0].assignment.clone()
    updates = []
    for x, labels in batches(3, rows=500):
        model.train()(x)
        updates.append(scheduler.step(labels))
    # The primed neck puts the class means where their prototypes are.
    assert updates[2].step == 2 and updates[2].moved <= 6
    assert (model.heads[0].assignment == before).sum() >= CLASSES - 6


def test_only_the_head_changes_and_the_model_is_put_back():
    model = Model(6, 'linear_bn').train()
    model.mix.eval()
    heard = []
    model.heads[0].training_view.on_mode = heard.append
    before = copy.deepcopy(model.mix.state_dict())
    random, variance = torch.get_rng_state(), None
    loader = list(batches(30))
    with torch.no_grad():
        variance = model.heads[0].neck(model.mix(torch.cat([x for x, _ in loader]))).var(0).sum()
    model.heads[0].neck[1].reset_running_stats()
    prime(model, iter(loader), max_batches=30, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.mix.state_dict().items())
    assert not model.mix.training and model.heads[0].training and model.heads[0].neck[1].training and not heard
    assert torch.equal(random, torch.get_rng_state()) and variance > 0
    assert model.heads[0].training_view.on_features is None
    # Batch norm's statistics fit: evaluation and training see the same.
    x = torch.cat([x for x, _ in loader])
    with torch.no_grad():
        head = model.heads[0]
        trained = head.neck(model.mix(x))
        away = model.eval().heads[0].neck(model.mix(x)) - trained
    assert away.square().mean().sqrt() < 0.05 * trained.square().mean().sqrt()


@pytest.mark.parametrize('neck', ['linear', 'none'])
def test_several_heads_and_no_neck(neck):
    model = Model(FEATURES if neck == 'none' else 6, neck, heads=2)
    before = model.heads[0].class_prototypes
    prime(model, batches(10), progress=False)
    first, second = model.heads
    assert not torch.allclose(first.class_prototypes, before, atol=0.1)
    assert torch.equal(first.assignment, second.assignment) and torch.equal(first.prototypes, second.prototypes)
    x, labels = next(batches(1, 1000, seed=1))
    assert accuracy(model, x, labels) > (0.3 if neck == 'none' else 0.5)


def test_soft_targets_count_by_their_shares():
    hard, soft = Model(6), Model(6)
    soft.load_state_dict(hard.state_dict())
    prime(hard, batches(10), progress=False)
    prime(soft, ((x, nn.functional.one_hot(labels, CLASSES).float()) for x, labels in batches(10)), progress=False)
    assert torch.allclose(hard.heads[0].neck.weight, soft.heads[0].neck.weight, atol=1e-5)


def test_ignored_and_broken_samples_are_left_out():
    plain, other = Model(6), Model(6)
    other.load_state_dict(plain.state_dict())
    prime(plain, batches(10), progress=False)

    def spoiled():
        for x, labels in batches(10):
            broken, ignored = x[:2].clone(), x[2:5] + 7.0
            broken[0, 1], broken[1, 3] = float('inf'), float('nan')
            yield torch.cat([x, broken, ignored]), torch.cat([labels, labels[:2], torch.full((3,), -100)])

    with pytest.warns(UserWarning, match=r'samples were left out: their features or targets are not finite'):
        prime(other, spoiled(), progress=False)
    assert torch.allclose(plain.heads[0].neck.weight, other.heads[0].neck.weight, atol=1e-5)
    assert torch.equal(plain.heads[0].assignment, other.heads[0].assignment)
    with pytest.raises(ValueError, match='no batch with labels'):
        prime(other, [(torch.randn(3, FEATURES), torch.full((3,), -100))], progress=False)


def test_unseen_classes_are_told_of():
    model = Model(6)
    with pytest.warns(UserWarning, match=r'1 of 20 classes had no images \(the first is class 7\)'):
        prime(model, ((x[labels != 7], labels[labels != 7]) for x, labels in batches(10)), progress=False)
    assert torch.isfinite(model.heads[0].neck.weight).all()
    assert sorted(model.heads[0].assignment.tolist()) == list(range(CLASSES))


@pytest.mark.parametrize('loader, message', [
    ([], 'has no batch'), ([(torch.zeros(3, FEATURES), torch.zeros(2, dtype=int))], 'targets must be class indices'),
    ([(torch.zeros(3, FEATURES), torch.tensor([0, 1, 20]))], 'class 20, outside 0..19'),
    ([(torch.full((3, FEATURES), float('nan')), torch.tensor([0, 1, 2]))], 'features .* not finite')])
def test_bad_input_changes_nothing(loader, message):
    model = Model(6)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        prime(model, loader, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.heads[0].training_view.on_features is None


def test_what_cannot_be_primed():
    with pytest.raises(ValueError, match=r'Linear.*no DL2PAHead'):
        prime(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match='scheduler belongs to another model'):
        prime(Model(6), [], AssignmentScheduler(Model(6)))


def test_the_bar_is_on_stderr_and_can_be_left_out(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
    prime(Model(6), list(batches(3)))
    assert '3/3' in capsys.readouterr().err
    prime(Model(6), list(batches(3)), progress=False)
    assert capsys.readouterr().err == ''


def test_patches_of_an_image_are_samples_of_its_class():
    generator = torch.Generator().manual_seed(0)
    x, targets = torch.randn(12, 3, 6, generator=generator), torch.arange(12) % 4
    heads = [DL2PAHead(6, 4, 3).eval() for _ in range(2)]
    heads[1].load_state_dict(heads[0].state_dict())
    for head, features, labels in ((heads[0], x, targets), (heads[1], x.flatten(0, 1), targets.repeat_interleave(3))):
        primer = Primer([head])
        head(features)
        primer.add(labels)
        primer.finish()
    assert all(torch.equal(value, heads[1].state_dict()[name]) for name, value in heads[0].state_dict().items())
