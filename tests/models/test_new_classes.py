"""New classes on spare prototypes: who gets which, what stays, what is refused, and what a file says."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.helpers.processes import run_ranks
from timm_dl2pa import AssignmentScheduler, DL2PAHead, add_classes, load_head, load_model, prime, save_model, wrap_dl2pa
from timm_dl2pa.head import free_prototypes
from timm_dl2pa.prototypes.spare import spread_spare

OLD, NEW, SPARE, FEATURES, DIM = 8, 3, 5, 24, 10


def samples(classes, rows=12, seed=0):
    """Features of classes by number, around centres that depend on nothing else, and labels from 0."""
    centres = torch.randn(OLD + SPARE, FEATURES, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(classes)).repeat(rows)
    return centres[classes][labels] + 0.3 * torch.randn(len(labels), FEATURES, generator=generator), labels


@pytest.fixture
def head():
    """Primed on its old classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = DL2PAHead(FEATURES, OLD, DIM, num_prototypes=OLD + SPARE)
    prime(head, [samples(torch.arange(OLD))], progress=False)
    return head.eval()


new_samples = samples(OLD + torch.arange(NEW))


def accuracy(head, classes):
    x, labels = samples(classes, seed=1)
    return (head(x).argmax(1) == classes[labels]).double().mean().item()


def test_it_classifies_old_and_new_at_once_and_the_old_keep_their_logits(head):
    x, _ = samples(torch.arange(OLD + NEW), seed=2)
    before, rows, vectors = head(x), head.assignment.clone(), head.class_prototypes.clone()
    was_right = accuracy(head, torch.arange(OLD))
    assert add_classes(head, new_samples, NEW) is head
    assert torch.equal(head.assignment[:OLD], rows) and torch.equal(head.class_prototypes[:OLD], vectors)
    assert torch.allclose(head(x)[:, :OLD], before, atol=1e-5)
    assert head.num_classes == head.config.num_classes == OLD + NEW and len(free_prototypes(head)) == SPARE - NEW
    assert accuracy(head, torch.arange(OLD)) > was_right - 0.1 > 0.8
    assert accuracy(head, OLD + torch.arange(NEW)) > 0.9
    embeddings = head.embed(new_samples[0]).detach()
    means = torch.stack([embeddings[new_samples[1] == label].mean(0) for label in range(NEW)])
    assert torch.allclose(head.class_prototypes[OLD:], F.normalize(means, dim=1), atol=1e-5)


def test_free_prototypes_are_matched_and_stay(make_head):
    head = make_head(FEATURES, OLD, DIM, num_prototypes=OLD + SPARE, recipe='even').eval()
    prototypes, free = head.prototypes.clone(), free_prototypes(head)
    embeddings = head.embed(new_samples[0]).detach()
    means = F.normalize(torch.stack([embeddings[new_samples[1] == label].mean(0) for label in range(NEW)]), dim=1)
    add_classes(head, new_samples, NEW, place='free')
    assert torch.equal(head.prototypes, prototypes) and not head.config.own_prototypes
    found = (means * head.class_prototypes[OLD:]).sum()
    every = torch.cartesian_prod(*[free] * NEW)
    every = every[[len(set(rows.tolist())) == NEW for rows in every]]
    best = max((means * prototypes[rows]).sum() for rows in every)
    assert found == pytest.approx(best.item(), abs=1e-5)


def test_after_a_placed_warm_up_spare_prototypes_are_spread_anew(head):
    """They were left where they were made, while those of the classes moved."""
    free, used = free_prototypes(head), head.class_prototypes.clone()
    nearest = (head.prototypes[free] @ used.t()).max().item()
    pinned = copy.deepcopy(head)
    pinned.config = type(head.config)(**{**vars(head.config), 'pinned': True})
    add_classes(pinned, new_samples, NEW, place='free')
    assert torch.equal(pinned.prototypes, head.prototypes)
    add_classes(head, new_samples, NEW, place='free')
    assert torch.equal(head.class_prototypes[:OLD], used)
    assert (head.prototypes[free] @ used.t()).max().item() < nearest - 0.1


def test_spare_prototypes_are_spread_as_evenly_as_can_be():
    """Two of four points in a plane, and one that is missing in a simplex."""
    points = F.normalize(torch.tensor([[1.0, 0], [-1, 0], [1, 0.1], [1, -0.2]]), dim=1)
    found = spread_spare(points, torch.tensor([2, 3]))
    assert torch.equal(found[:2], points[:2])
    assert (found[2:] @ found.t()).abs().sort().values.flatten().tolist() == pytest.approx([0, 0, 1, 1] * 2, abs=0.05)
    simplex = F.normalize(torch.eye(6) - 1 / 6, dim=1)
    moved = simplex.clone()
    moved[4] = F.normalize(torch.randn(6, generator=torch.Generator().manual_seed(0)), dim=0)
    moved[4] -= moved[4].mean()
    found = spread_spare(F.normalize(moved, dim=1), torch.tensor([4]))
    assert torch.allclose(found, simplex, atol=1e-2) and torch.allclose(found.norm(dim=1), torch.ones(6))


def test_a_few_steps_of_training_bring_free_prototypes_their_classes(head):
    add_classes(head, new_samples, NEW, place='free')
    new = OLD + torch.arange(NEW)
    before = accuracy(head, new)
    x, labels = samples(torch.arange(OLD + NEW))
    optimizer = torch.optim.AdamW(head.neck.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(head(x), labels).backward()
        optimizer.step()
    assert before < 0.7 and accuracy(head, new) > 0.9 and accuracy(head, torch.arange(OLD)) > 0.9


def test_several_sessions_and_loaders_give_the_same_as_one(head):
    other = copy.deepcopy(head)
    x, labels = new_samples
    for label in range(NEW):
        add_classes(head, (x[labels == label], torch.zeros(12, dtype=torch.int64)), 1)
    add_classes(other, [{'pixel_values': x[::2], 'labels': labels[::2]}, (x[1::2], labels[1::2])], NEW)
    assert torch.allclose(head.class_prototypes, other.class_prototypes, atol=1e-6)
    with pytest.raises(ValueError, match=r'num_prototypes=13 exceeds num_classes=11.*num_prototypes=14'):
        add_classes(head, new_samples, NEW)
    assert head.num_classes == OLD + NEW


def test_the_optimiser_goes_on_and_an_old_scheduler_is_refused(head):
    head.train()
    scheduler = AssignmentScheduler(head, interval=1)
    with pytest.raises(ValueError, match=r'warm-up .* is under way'):
        add_classes(head, new_samples, NEW)
    scheduler.skip_warmup()
    optimizer = torch.optim.SGD(head.parameters(), 0.1)
    x, labels = samples(torch.arange(OLD + NEW))
    head(x[labels < OLD]), scheduler.step(labels[labels < OLD])
    add_classes(head, new_samples, NEW)
    assert head.training_view.on_forward is None
    assert head.training and {id(p) for p in head.parameters()} == {id(p) for p in optimizer.param_groups[0]['params']}
    head(x)
    for call in (lambda: scheduler.step(labels), scheduler.resolve_if_due):
        with pytest.raises(RuntimeError, match=r'has 11 classes, .* had 8: make a new one after add_classes'):
            call()
    again = AssignmentScheduler(head, interval=1, warmup='none')
    for _ in range(2):
        F.cross_entropy(head(x), labels).backward()
        update = again.step(labels)
    assert update is not None


NAMES = [f'class {number}' for number in range(OLD)]
REFUSED = {
    'place': (dict(place='near'), 'place must be one of mean, free'),
    'too many': (dict(names=6), '6 new classes, but the head has 5 spare'),
    'no number': (dict(names=0), 'names must be at least 1'),
    'no names': (dict(names='cat'), "names must be a list of names of new classes, or their number, not 'cat'"),
    'an odd name': (dict(names=['a', 'b', 3]), 'that of class 2 is 3, which is no string'),
    'no old names': (dict(names=['a', 'b', 'c']), 'no names of its 8 classes.*names=3'),
    'no sample of a class': (dict(names=4), 'no usable sample of 1 of the 4 new classes .*label 3'),
    'labels of all classes': (dict(data=(new_samples[0], new_samples[1] + OLD)), 'from 0, .* not 8.*subtract'),
    'labels of a kind': (dict(data=(new_samples[0], new_samples[1].float())), 'indices .int64., not torch.float32'),
    'soft labels': (dict(data=(new_samples[0], torch.full((36, 3), 1 / 3))), 'class indices .B,., not .*36, 3'),
    'few labels': (dict(data=(new_samples[0], new_samples[1][:-1])), 'has 36 features and 35 labels'),
    'images': (dict(data=(torch.zeros(36, 3, 8, 8), new_samples[1])), r'\[\(images, labels\)\]'),
    'nothing': (dict(data=[]), 'no usable sample of 3'),
    'not finite': (dict(data=(new_samples[0].where(new_samples[1].unsqueeze(1) != 1, torch.nan), new_samples[1])),
                   'label 1; 12 samples are not finite'),
    'no batches': (dict(data=[new_samples[0]]), 'a batch of loader must be a pair'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_bad_input_is_refused_before_anything_changed(head, case):
    arguments, message = REFUSED[case]
    before, config = copy.deepcopy(head.state_dict()), head.config
    with pytest.raises(ValueError, match=message):
        add_classes(head, **{'data': new_samples, 'names': NEW, **arguments})
    assert head.config is config and all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    assert head.training_view.on_features is None


def test_names_are_new_and_different(head):
    head.label_names = NAMES
    for names, message in ((['a', 'class 3', 'b'], "'class 3' is class 3 of the model"), (['a', 'b', 'a'], 'twice'),
                           (3, 'the model has names of its 8 classes')):
        with pytest.raises(ValueError, match=message):
            add_classes(head, new_samples, names)
    add_classes(head, new_samples, ['a', 'b', 'c'])
    assert head.label_names == [*NAMES, 'a', 'b', 'c']


def test_a_class_that_is_there_already_is_warned_of(head):
    with pytest.warns(UserWarning, match='new class 0 lie where class 2 has its prototype') as said:
        x = head.embed(samples(torch.tensor([2]))[0])
        with torch.no_grad():
            head.prototypes[head.assignment[2]] = F.normalize(x.mean(0), dim=0)
        add_classes(head, samples(torch.tensor([2])), 1)
    assert said[0].filename == __file__


def test_samples_that_are_not_finite_are_left_out_with_a_warning(head):
    other = copy.deepcopy(head)
    x, labels = new_samples
    with pytest.warns(UserWarning, match='1 samples were left out') as said:
        add_classes(head, (torch.cat([x, torch.full((1, FEATURES), torch.inf)]), torch.cat([labels, labels[:1]])), NEW)
    add_classes(other, new_samples, NEW)
    assert torch.equal(head.prototypes, other.prototypes) and said[0].filename == __file__


def test_saved_heads(head, tmp_path):
    add_classes(head, new_samples, NEW)
    loaded = load_head(head.save_pretrained(tmp_path, label_names=[str(number) for number in range(OLD + NEW)]))
    assert torch.equal(loaded(new_samples[0]), head(new_samples[0]))
    add_classes(loaded, samples(torch.tensor([OLD + NEW])), ['one more'])
    assert load_head(loaded.save_pretrained(tmp_path)).label_names[-1] == 'one more'


# --- whole models

IMAGES, LABELS = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return wrap_dl2pa(timm.create_model('test_resnet', num_classes=OLD), dim=8, num_prototypes=12)


@pytest.mark.timm
@pytest.mark.filterwarnings('ignore:the embeddings of new class')  # images at random look alike
def test_a_model_saves_loads_and_resets_with_its_new_classes(model, tmp_path):
    model.label_names = list(NAMES)
    mode, logits = model.training, model.eval()(IMAGES)
    assert mode and add_classes(model.train(), [(IMAGES, LABELS)], ['a', 'b']) is model and model.training
    assert torch.allclose(model.eval()(IMAGES)[:, :OLD], logits, atol=1e-5)
    assert (model.num_classes, model.label_names) == (10, [*NAMES, 'a', 'b'])
    assert model.get_classifier().num_classes == 10
    folder = save_model(model, tmp_path)
    for loaded in (load_model(folder), timm.create_model(f'local-dir:{folder}', pretrained=True).eval()):
        assert torch.equal(loaded(IMAGES), model(IMAGES)) and loaded.label_names == model.label_names
    # A loaded model gets classes, and is saved, too.
    loaded = load_model(folder)
    add_classes(loaded, [(IMAGES, LABELS)], ['c', 'd'])
    assert loaded.pretrained_cfg['num_classes'] == len(loaded.pretrained_cfg['label_names']) == 12
    again = load_model(save_model(loaded, tmp_path))
    assert torch.equal(again(IMAGES), loaded(IMAGES)) and again.label_names == [*NAMES, *'abcd']
    loaded.reset_classifier(20)
    assert loaded(IMAGES).shape == (6, 20) and loaded.label_names is None
    # A copy's are its own.
    twin = copy.deepcopy(model)
    add_classes(twin, [(IMAGES, LABELS)], ['c', 'd'])
    assert (model.num_classes, twin.num_classes, twin.get_classifier().num_classes) == (10, 12, 12)


@pytest.mark.timm
@pytest.mark.filterwarnings('ignore:the embeddings of new class')
def test_all_heads_of_a_model_get_them():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model('deit_tiny_distilled_patch16_224', img_size=32, depth=1, num_classes=5)
    wrap_dl2pa(model, 6, num_prototypes=9)
    add_classes(model, [(IMAGES, LABELS)], 2)
    first, second = model.get_classifier()
    assert first.num_classes == second.num_classes == model.num_classes == 7 == model.eval()(IMAGES).shape[1]
    assert torch.equal(first.assignment, second.assignment) and torch.equal(first.prototypes, second.prototypes)
    second.assign(second.assignment.flip(0))
    with pytest.raises(ValueError, match='heads of the model differ'):
        add_classes(model, [(IMAGES, LABELS)], 2)


@pytest.mark.timm
def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match='has no DL2PAHead: wrap it'):
        add_classes(timm.create_model('test_resnet', num_classes=3), [(IMAGES, LABELS)], 2)


# --- several processes

def _in_process(rank, folder):
    torch.manual_seed(0)
    head = DL2PAHead(FEATURES, OLD, DIM, num_prototypes=OLD + SPARE)
    model = torch.nn.parallel.DistributedDataParallel(head).eval()
    x, labels = new_samples
    mine = labels < 1 if rank == 0 else labels >= 1  # no process has all classes
    add_classes(model, [(x[mine], labels[mine])], NEW)
    try:
        add_classes(model, [(x, labels)], NEW)
    except ValueError as error:
        said = str(error)
    torch.save((head.prototypes, head.assignment, model(x).shape[1], said), f'{folder}/{rank}.pt')


@pytest.mark.slow
def test_each_process_gives_its_part_and_all_get_the_same(tmp_path):
    run_ranks(_in_process, str(tmp_path), folder=tmp_path)
    (points, rows, width, said), other = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert torch.equal(points, other[0]) and torch.equal(rows, other[1]) and width == other[2] == OLD + NEW
    assert said == other[3] and '2 spare prototypes' in said
    torch.manual_seed(0)
    alone = DL2PAHead(FEATURES, OLD, DIM, num_prototypes=OLD + SPARE).eval()
    add_classes(alone, new_samples, NEW)
    assert torch.allclose(alone.prototypes, points, atol=1e-6) and torch.equal(alone.assignment, rows)
