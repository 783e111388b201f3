"""Prototypes that are placed during the warm-up: the step, its end, the defaults, the plugin."""
import math

import pytest
import torch

from tests.helpers.largest_output import LargestOutput
from tests.helpers.stand_in import BATCHES, train
from timm_dl2pa import AssignmentScheduler, DL2PAHead
from timm_dl2pa.scheduling import placement
from timm_dl2pa.scheduling.placement import PrototypePlacement, default_evenness
from timm_dl2pa.timm_scripts import plugged_in


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def move(placed, vectors, embeddings, targets, scale, share=None):
    """Return all vectors (C, d) after a batch."""
    classes, moved = placed.moved(vectors.__getitem__, embeddings, targets, scale, share)
    return vectors.index_copy(0, classes, moved)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def plugin():
    with plugged_in():
        yield


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('evenness, scale', [(0.0, 5.0), (0.4, 5.0), (90.0, 5.0), (0.7, 20.0)])
@pytest.mark.parametrize('rows, share', [(2, 0.0), (40, 0.25), (40, None)])
def test_the_step_is_down_the_gradient_of_cross_entropy_and_energy(soft, evenness, scale, rows, share):
    """Against autograd, over two steps: the second allows for the class frequencies of the first. With 40 rows and an
    evenness of 90 the energy's part is as long as it may be."""
    classes, dim, scale = 6, 4, torch.tensor(scale)
    ours = PrototypePlacement(classes, evenness)
    vectors, counts, seen = unit(classes, dim), torch.ones(classes), 0.0
    for _ in range(2):
        embeddings, labels = unit(rows, dim), torch.randint(0, 3, (rows,))
        one_hot = torch.nn.functional.one_hot(labels, classes).float()
        targets = 0.7 * one_hot + 0.3 * one_hot.flip(0) if soft else labels    # mixup's
        leaf = vectors.clone().requires_grad_()
        cross_entropy = torch.nn.functional.cross_entropy(scale * embeddings @ leaf.t() + counts.log(), targets)
        pairs = torch.triu_indices(classes, classes, 1)
        energy = (4 * ((leaf[pairs[0]] * leaf[pairs[1]]).sum(1) - 1)).exp().mean().log()
        seen += rows / classes
        batch = targets.sum(0) if soft else one_hot.sum(0)
        frequencies = ((counts + batch) / (classes * (seen + 1))).unsqueeze(1)
        rates = (1 / (1 + seen / 50) if share is None else 1 - share) * (
            0.3 / (frequencies / rows + frequencies.square()).sqrt()).clamp(max=1.5 * rows)
        spread = (rates * evenness / scale).clamp(max=classes * 1.5 / (8 * classes / (classes - 1) * (1 + 8 / dim)))
        pulls, spreads = (torch.autograd.grad(value, leaf)[0] for value in (cross_entropy, energy))
        gradient = rates / scale * pulls + spread * spreads
        tangent = gradient - (gradient * vectors).sum(dim=1, keepdim=True) * vectors
        expected = torch.nn.functional.normalize(vectors - tangent, dim=1)
        moved = move(ours, vectors, embeddings, targets, scale, share)
        assert torch.allclose(moved, expected, atol=1e-5) and not torch.allclose(moved, vectors, atol=1e-3)
        counts += batch
        vectors = moved


def test_very_many_classes_are_kept_from_one_block_after_the_other(monkeypatch):
    vectors = unit(240, 3)
    ours = PrototypePlacement(240, 1.0)
    monkeypatch.setattr(placement, '_BLOCK', 240)
    weights = torch.ones(240, 1)
    whole = torch.mm(*ours._repulsion(vectors, weights))
    monkeypatch.setattr(placement, '_BLOCK', 80)
    parts = []
    for ours.steps in range(4):
        parts.append(torch.mm(*ours._repulsion(vectors, weights)))
    assert torch.equal(parts[0], parts[3]) and not torch.allclose(parts[0], parts[1])
    mean = sum(parts[:3]) / 3
    assert (mean - whole).norm() < 0.2 * whole.norm() < (parts[0] - whole).norm()


def test_of_very_many_classes_a_sample_moves_as_all_would_on_average(monkeypatch):
    """The classes of the batch move by the step that they have among all; the others by theirs on average."""
    monkeypatch.setattr(placement, 'NUM_SAMPLED', 30)
    monkeypatch.setattr(placement, '_BLOCK', 240)
    vectors, embeddings, labels = unit(240, 8), unit(20, 8), torch.randint(0, 40, (20,))
    whole = move(PrototypePlacement(240, 0.1), vectors, embeddings, labels, torch.tensor(8.0), 0.99) - vectors
    monkeypatch.setattr(placement, 'MANY_CLASSES', 100)
    ours, sums, moved = PrototypePlacement(240, 0.1), torch.zeros(240, 8), torch.zeros(240)
    for _ in range(600):
        ours.counts.zero_()
        ours.seen.zero_()
        step = move(ours, vectors, embeddings, labels, torch.tensor(8.0), 0.99) - vectors
        assert step[labels].norm(dim=1).gt(0).all() and step.norm(dim=1).gt(0).sum() <= 30 + 20
        sums += step
        moved += step.norm(dim=1) > 0
    batch = torch.bincount(labels, minlength=240) > 0
    assert (moved[batch] == 600).all() and 30 < moved[~batch].min() <= moved[~batch].max() < 150
    mean = sums / 600
    assert torch.allclose(mean[batch], whole[batch], rtol=0.1, atol=0.1 * float(whole[batch].norm(dim=1).mean()))
    assert (mean - whole)[~batch].norm() < 0.5 * whole[~batch].norm()
    others = (sums / moved.clamp_min(1).unsqueeze(1))[~batch]
    assert others.norm() > 4 * whole[~batch].norm()  # each time it is sampled it stands for seven


def test_what_moves_of_very_many_classes_goes_on_bit_for_bit(monkeypatch):
    monkeypatch.setattr(placement, 'MANY_CLASSES', 100)
    monkeypatch.setattr(placement, 'NUM_SAMPLED', 30)
    batches = [(unit(20, 8), torch.randint(0, 240, (20,))) for _ in range(4)]
    first, vectors = PrototypePlacement(240, 0.1, seed=3), unit(240, 8)
    for index, (embeddings, labels) in enumerate(batches):
        if index == 2:
            resumed, others = PrototypePlacement(240, 0.1, seed=3), vectors
            resumed.load_state_dict(first.state_dict())
        vectors = move(first, vectors, embeddings, labels, torch.tensor(8.0), 0.1)
    for embeddings, labels in batches[2:]:
        others = move(resumed, others, embeddings, labels, torch.tensor(8.0), 0.1)
    assert torch.equal(vectors, others)


def test_a_step_of_very_many_classes_allocates_nothing_of_their_number(monkeypatch):
    monkeypatch.setattr(placement, 'NUM_SAMPLED', 100)
    head = DL2PAHead(8, 200_000, 4, prototypes=unit(200_000, 4), train_output='embeddings')
    scheduler = AssignmentScheduler(head, total=10)
    features = torch.randn(16, 8)
    for _ in range(2):
        head(features)
        with LargestOutput() as seen:
            scheduler.step(torch.randint(0, 200_000, (16,)))
    assert 0 < seen.largest < 20_000 and scheduler.warming_up


@pytest.mark.parametrize('evenness', [3.2, 10.0, 200.0])
def test_strong_evenness_does_not_overshoot(evenness):
    """Of few classes, which many samples pull: they come to the simplex, where all cosines are -1 / (C - 1)."""
    classes, dim = 6, 16
    ours, vectors, scale = PrototypePlacement(classes, evenness), unit(classes, dim), torch.tensor(4.0)
    for _ in range(100):
        vectors = move(ours, vectors, unit(64, dim), torch.randint(0, classes, (64,)), scale)
    cosines = (vectors @ vectors.t())[~torch.eye(classes, dtype=torch.bool)]
    assert torch.allclose(cosines, torch.tensor(-1 / (classes - 1)), atol=0.1), cosines


def test_one_sample_of_very_many_classes_does_not_carry_its_class_away():
    """It would by 3.8 otherwise, and by as much more as there are more classes."""
    vectors, classes = unit(2000, 16), 2000
    ours = PrototypePlacement(classes, 0.0)
    z = torch.nn.functional.normalize(torch.linalg.svd(vectors[:1])[2][1:2], dim=1)  # at a right angle to its class
    embeddings, labels = torch.cat([z] + 15 * [vectors[5:6]]), torch.tensor([0] + 15 * [5])
    moved = move(ours, vectors, embeddings, labels, torch.tensor(20.0), 0.0)
    assert torch.atan2((moved[0] @ z[0]), moved[0] @ vectors[0]) == pytest.approx(math.atan(1.5), abs=0.02)


def test_a_step_that_is_not_finite_moves_nothing():
    ours, vectors, labels = PrototypePlacement(6, 0.3), unit(6, 4), torch.tensor([0, 1])
    embeddings = unit(2, 4)
    embeddings[1] = float('nan')
    assert torch.equal(move(ours, vectors, embeddings, labels, torch.tensor(5.0)), vectors)
    assert not torch.equal(move(ours, vectors, embeddings[:1], labels[:1], torch.tensor(5.0)), vectors)


def test_a_placement_comes_to_rest_when_its_end_is_known():
    ours, vectors, labels = PrototypePlacement(6, 0.3), unit(6, 4), torch.tensor([0, 1])
    embeddings, steps = unit(2, 4), []
    for share in (0.0, 0.5, 0.9, 1.0):
        steps.append(float((move(ours, vectors, embeddings, labels, torch.tensor(5.0), share) - vectors).norm()))
    assert steps == sorted(steps, reverse=True) and steps[-1] < 1e-6 < 0.02 < steps[0]


def test_by_default_the_fewer_dimensions_the_less_even():
    assert default_evenness(100, 10) == pytest.approx(0.004) and default_evenness(100, 50) == pytest.approx(0.1)
    assert default_evenness(100, 100) == default_evenness(100, 512) == 0.4 > default_evenness(100, 98) > 0.38
    assert AssignmentScheduler(DL2PAHead(8, 7, 5)).warmup.settings == {'evenness': default_evenness(7, 5)}
    assert AssignmentScheduler(DL2PAHead(8, 7, 5), evenness=0).warmup.settings == {'evenness': 0}


def test_prototypes_move_until_the_warmup_ends_and_never_again():
    head = DL2PAHead(8, 7, 3, num_prototypes=9, neck='linear')
    head.assign(torch.tensor([8, 1, 2, 3, 4, 5, 0]))
    scheduler = AssignmentScheduler(head, interval=3, warmup_length=3)
    seen = [head.prototypes.clone()]
    for step in range(9):
        labels = torch.randint(0, 7, (20,))
        features = 3 * torch.eye(8)[labels] + torch.randn(20, 8)
        logits = head(features)
        # What is trained with is what is saved and evaluated with.
        expected = head.current_scale() * head.embed(features) @ head.class_prototypes.t()
        assert torch.allclose(logits, expected, atol=1e-4)
        update = scheduler.step(labels)
        assert (update and update.event) == {3: 'placed', 6: 'resolve'}.get(step)
        seen.append(head.prototypes.clone())
        if step == 3:
            assert update.event == 'placed' and update.moved == 0 and update.objective > update.objective_before
            # Nothing is left of embeddings that followed moving prototypes.
            sums = torch.zeros(7, 3, dtype=torch.float64).index_add_(0, labels, head.embed(features).detach().double())
            assert torch.allclose(scheduler.class_means.sums.double(), sums, atol=1e-5)
        assert head.warming_up == scheduler.warming_up == (step < 3)
    assert all(not torch.equal(seen[step], seen[step + 1]) for step in range(4))
    assert all(torch.equal(seen[4], later) for later in seen[5:])
    assert torch.allclose(head.prototypes.norm(dim=1), torch.ones(9))
    assert torch.equal(head.prototypes[6:8], seen[0][6:8])   # prototypes of no class
    # Its prototypes cannot be made again from the seed: a copy's config must say so.
    assert head.config.own_prototypes


@pytest.mark.parametrize('at_a_time', [2 ** 13, 3])
def test_at_the_end_prototypes_of_few_samples_come_to_their_class_means(monkeypatch, at_a_time):
    """The later samples count more; a class with more samples moves less, one without any not at all."""
    monkeypatch.setattr(placement, '_CLASSES_AT_A_TIME', at_a_time)
    head = DL2PAHead(8, 4, 3, num_prototypes=6)
    scheduler = AssignmentScheduler(head, interval=10, warmup_length=10)
    sums, counts = torch.zeros(4, 3), torch.zeros(4, 1)
    for step in range(10):
        labels = torch.tensor([0] * 30 + [1] * 5 + [2])
        scheduler.step(labels, embeddings := unit(36, 3))
        sums.index_add_(0, labels, (step + 1) ** 2 * embeddings)
        counts.index_add_(0, labels, torch.ones(36, 1))
    before, means = head.class_prototypes.clone(), torch.nn.functional.normalize(sums, dim=1)
    means[:3] = torch.nn.functional.normalize(means[:3] - means[:3].mean(dim=0), dim=1)    # of the classes that came
    update = scheduler.step(labels, embeddings)
    weights = 1 / (1 + (counts / 50) ** 2)
    expected = torch.nn.functional.normalize(before + weights * means, dim=1)
    assert torch.allclose(head.class_prototypes, expected, atol=1e-5)
    assert torch.equal(expected[3], before[3])
    assert update.objective == pytest.approx(float((means * expected).sum()), abs=1e-4)
    assert update.objective_before == pytest.approx(float((means * before).sum()), abs=1e-4)


def test_placed_prototypes_fit_the_embeddings_better_than_rotated_ones():
    """Three classes on one side of a circle, one on the other: four even points, 90 degrees apart, fit them nowhere."""
    angles = torch.tensor([-40.0, 0.0, 40.0, 180.0]).deg2rad()
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    right = []
    for options in (dict(evenness=0.0), dict(recipe='even')):
        head = DL2PAHead(2, 4, 2, neck='none', scale=10.0)
        scheduler = AssignmentScheduler(head, interval=200, **options)
        for _ in range(201):
            labels = torch.randint(0, 4, (64,))
            head(directions[labels])
            scheduler.step(labels)
        right.append(int((head.eval()(directions).argmax(1) == torch.arange(4)).sum()))
    assert right[0] == 4 > right[1]


@pytest.mark.timm
def test_the_plugin_places_for_nine_tenths_of_the_scripts_epochs(plugin, tmp_path):
    task = train(tmp_path, epochs=7, dl2pa_dim=3)
    assert [(update.event, update.step, update.epoch) for update in task.assignment_scheduler.history] == [
        ('placed', 6 * BATCHES, 6)]
    even = train(tmp_path / 'even', epochs=5, dl2pa_dim=3, dl2pa_recipe='even').assignment_scheduler.history
    assert [(update.event, update.epoch) for update in even[:2]] == [('rotated', 1), ('resolve', 2)]
    own = train(tmp_path / 'own', epochs=3, dl2pa_dim=3, dl2pa_evenness=0.3, dl2pa_warmup_length='9 epochs')
    assert own.assignment_scheduler.warmup.settings == {'evenness': 0.3}


@pytest.mark.timm
def test_an_average_of_the_model_has_the_prototypes_of_the_moment(plugin, tmp_path):
    task = train(tmp_path, dl2pa_dim=3, dl2pa_warmup_length='9 epochs', ema=True)
    head = task.dl2pa_heads[0]
    averaged = task.get_trainable_module(ema=True).module.get_classifier()
    assert head.warming_up and torch.equal(averaged.prototypes, head.prototypes)
    assert not torch.equal(averaged.neck[0].weight, head.neck[0].weight)


@pytest.mark.timm
@pytest.mark.parametrize('value', ['even', -1, float('nan'), True])
def test_bad_values_of_the_option(plugin, tmp_path, value):
    with pytest.raises(ValueError, match='evenness must be'):
        train(tmp_path, dl2pa_dim=3, dl2pa_evenness=value)
