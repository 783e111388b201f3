import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import reference
from timm_dl2pa import AssignmentScheduler, DL2PAConfig, DL2PAHead, default_scale, load_head, make_prototypes
from timm_dl2pa.head import TrainingView


def state_of(head):
    return {name: tensor.clone() for name, tensor in head.state_dict().items()}


def assert_same_state(head, state):
    assert head.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in head.state_dict().items())


@pytest.mark.parametrize('neck', ['linear', 'linear_bn', 'none'])
def test_logits_are_the_papers(make_head, generator, neck):
    head = make_head(in_features=4 if neck == 'none' else 12, neck=neck, num_prototypes=9, scale=5.0).eval()
    head.assign(torch.randperm(9, generator=generator)[:7])
    x = torch.randn(6, head.in_features, generator=generator)
    embeddings = reference.embed(head.neck(x).detach().numpy())
    expected = reference.logits(embeddings, head.prototypes.double().numpy(), head.assignment.tolist(), 5.0)
    assert torch.allclose(head(x).double(), torch.from_numpy(expected), atol=1e-5)
    assert torch.allclose(head.embed(x).double(), torch.from_numpy(embeddings), atol=1e-6)
    assert torch.equal(head.class_prototypes, head.prototypes[head.assignment])


@given(seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_permuted_assignment_permutes_logits(seed):
    head = DL2PAHead(5, 6, 3).eval()
    generator = torch.Generator().manual_seed(seed)
    order, x = torch.randperm(6, generator=generator), torch.randn(4, 5, generator=generator)
    before = head(x)
    head.assign(head.assignment[order])
    assert torch.allclose(head(x), before[:, order], atol=1e-5)


def test_prototypes_are_no_parameters_and_one_per_class(make_head):
    head = make_head(learn_scale=True)
    assert {name for name, _ in head.named_parameters()} == {'neck.weight', 'neck.bias', 'log_scale'}
    assert {name for name, _ in make_head().named_buffers()} == {
        'prototypes', 'assignment', 'averaged_assignment', 'scale'}
    assert 'averaged_assignment' not in head.state_dict()
    assert head.prototypes.dtype == torch.float32 and head.assignment.dtype == torch.int64


@pytest.mark.parametrize('classes, scale', [(2, 4.605), (10, 10.267), (100, 13.67), (1000, 16.10)])
def test_default_scale_is_the_bound_of_cosface(classes, scale):
    """At this scale an embedding on its corner of a simplex has the probability 0.9999."""
    assert default_scale(classes) == pytest.approx(scale, abs=0.01)
    logits = torch.full((classes,), -default_scale(classes) / (classes - 1), dtype=torch.double)
    logits[0] = default_scale(classes)
    assert logits.softmax(0)[0].item() == pytest.approx(0.9999, abs=1e-7)


def test_scale_given_and_learned(make_head, generator):
    x, labels = torch.randn(6, 12, generator=generator), torch.arange(6)
    plain, scaled, learned = make_head(), make_head(scale=3.0), make_head(scale=3.0, learn_scale=True)
    cosines = plain(x) / default_scale(7)
    assert torch.allclose(scaled(x), 3 * cosines, atol=1e-5) and torch.allclose(learned(x), 3 * cosines, atol=1e-5)
    optimizer = torch.optim.SGD(learned.parameters(), lr=0.5)
    torch.nn.functional.cross_entropy(learned(x), labels).backward()
    optimizer.step()
    assert learned.current_scale().item() != pytest.approx(3.0, abs=1e-3)
    assert scaled.state_dict()['scale'] == 3.0


@pytest.mark.parametrize('autocast', [None, torch.bfloat16, torch.float16])
def test_zero_embeddings_have_finite_logits_and_gradients(make_head, autocast):
    head = make_head(neck='none', in_features=4)
    x = torch.zeros(3, 4, requires_grad=True)
    with torch.autocast('cpu', autocast or torch.bfloat16, enabled=autocast is not None):
        logits = head(x)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    loss.backward()
    assert torch.equal(logits, torch.zeros(3, 7)) and torch.isfinite(x.grad).all()
    # Next to zero, too: the gradient of the direction grows as 1 / length, up to a limit.
    for length in (1e-30, 1e-7, 1e-5):
        x = torch.full((1, 4), length, requires_grad=True)
        head(x).sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().max() < 1e8


def test_nan_stays_nan(make_head):
    head = make_head(neck='none', in_features=4)
    assert head(torch.full((1, 4), float('nan'))).isnan().all()
    assert head(torch.full((1, 4), float('inf'))).isnan().any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_float32_where_it_matters(make_head, generator, dtype):
    head, x = make_head().eval(), torch.randn(6, 12, generator=generator)
    expected = head(x)
    with torch.autocast('cpu', dtype):
        logits = head(x)
        assert head.embed(x).dtype == torch.float32 and logits.dtype == torch.float32
    assert torch.allclose(logits, expected, atol=0.3) and not torch.equal(logits, expected)
    # Given the same neck output, autocast changes nothing at all.
    bare = make_head(neck='none', in_features=4)
    with torch.autocast('cpu', dtype):
        under = bare(x[:, :4])
    assert torch.equal(under, bare(x[:, :4]))


@pytest.mark.parametrize('convert', [lambda h: h.to(torch.bfloat16), lambda h: h.half(), lambda h: h.double()])
def test_prototypes_stay_float32_when_the_model_does_not(make_head, convert):
    head = make_head()
    prototypes = head.prototypes.clone()
    model = convert(torch.nn.Sequential(head))
    assert model[0].neck.weight.dtype != torch.float32
    assert head.prototypes.dtype == head.scale.dtype == torch.float32 and torch.equal(head.prototypes, prototypes)
    assert head(torch.randn(3, 12).to(head.neck.weight.dtype)).dtype == torch.float32


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('neck', ['linear', 'linear_bn'])
@pytest.mark.parametrize('train_output', ['logits', 'embeddings'])
def test_two_training_steps_lower_the_loss(make_head, generator, autocast, neck, train_output):
    from timm_dl2pa import SquaredCosineLoss
    head = make_head(neck=neck, train_output=train_output)
    prototypes = head.prototypes.clone()
    criterion = SquaredCosineLoss(head)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    x, labels = torch.randn(32, 12, generator=generator), torch.randint(0, 7, (32,), generator=generator)
    losses = []
    for _ in range(3):
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            loss = criterion(head(x), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert torch.equal(head.prototypes, prototypes)


def test_train_output(make_head, generator):
    head, x = make_head(train_output='embeddings'), torch.randn(5, 12, generator=generator)
    assert head.train()(x).shape == (5, 4) and torch.allclose(head(x).norm(dim=1), torch.ones(5))
    assert head.eval()(x).shape == (5, 7)


# ---- state


def test_state_dict_round_trip_to_the_bit(make_head, generator):
    head = make_head(neck='linear_bn', num_prototypes=9, seed=3, scale=4.0)
    head.assign(torch.randperm(9, generator=generator)[:7])
    head(torch.randn(8, 12, generator=generator))
    other = make_head(neck='linear_bn', num_prototypes=9)
    other.load_state_dict(head.state_dict())
    assert_same_state(other, state_of(head))
    # The config tells the truth of what was loaded.
    assert other.config.scale == 4.0 and other.config.own_prototypes
    rebuilt = DL2PAHead.from_config(other.config, other.prototypes)
    rebuilt.load_state_dict(other.state_dict())
    x = torch.randn(3, 12, generator=generator)
    assert torch.equal(rebuilt.eval()(x), head.eval()(x))


def changed(state, **changes):
    return {**state, **changes}


@pytest.mark.parametrize('other, message', [
    (dict(num_classes=8, num_prototypes=9), r'assignment has the shape \(8,\).*num_classes=7'),
    (dict(num_prototypes=11), r'prototypes has the shape \(11, 4\).*num_prototypes=9'),
    (dict(dim=5, num_prototypes=9), r'shape \(9, 5\).*dim=4'),
    (dict(in_features=13, num_prototypes=9), r'neck.weight.*in_features=12'),
])
def test_loading_another_size_is_an_error_and_changes_nothing(make_head, other, message):
    head = make_head(num_prototypes=9, seed=1)
    before = state_of(head)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            head.load_state_dict(make_head(**other).state_dict(), strict=strict)
        assert_same_state(head, before)


@pytest.mark.parametrize('break_it, message', [
    (lambda s: changed(s, prototypes=1.1 * s['prototypes']), 'unit rows'),
    (lambda s: changed(s, prototypes=s['prototypes'] * float('nan')), 'finite'),
    (lambda s: changed(s, assignment=s['assignment'].clone().fill_(2)), 'classes 0 and 1 share the prototype 2'),
    (lambda s: changed(s, assignment=s['assignment'] + 7), 'outside 0..8'),
    (lambda s: changed(s, assignment=s['assignment'] - 1), 'outside 0..8'),
    (lambda s: changed(s, assignment=s['assignment'] + 0.5), 'cannot be averaged'),
    (lambda s: changed(s, scale=torch.tensor(0.0)), 'scale must be between 1e-06 and 1e.06, not 0.0'),
    (lambda s: changed(s, scale=torch.tensor(float('nan'))), 'scale must be between'),
    (lambda s: changed(s, scale=torch.tensor(1e9)), 'scale must be between'),
    (lambda s: changed(s, prototypes=s['prototypes'].to(torch.float8_e4m3fn)), 'prototypes must be float32'),
])
def test_loading_nonsense_is_an_error_and_changes_nothing(make_head, break_it, message):
    head, donor = make_head(num_prototypes=9), make_head(num_prototypes=9, seed=5)
    torch.nn.init.normal_(donor.neck.weight)
    before, config = state_of(head), head.config
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(break_it(donor.state_dict()))
    assert_same_state(head, before)
    assert head.config == config


def test_statistics_and_scales_that_no_training_gives_are_refused(make_head):
    head = make_head(neck='linear_bn', learn_scale=True)
    before, config = state_of(head), head.config
    for change, message in ((dict(log_scale=torch.tensor([1000.0])), 'log_scale must be between -14 and 14, not 1000'),
                            (dict(log_scale=torch.tensor([float('nan')])), 'log_scale must be between'),
                            ({'neck.1.running_var': -torch.ones(4)}, 'neck.1.running_var must not be negative')):
        with pytest.raises(RuntimeError, match=message):
            head.load_state_dict({**before, **change})
        assert_same_state(head, before)
        assert head.config == config


def test_average_of_checkpoints_loads_when_assignments_agree(make_head):
    """timm's avg_checkpoints.py makes everything float32."""
    one, two = make_head(), make_head()
    one.assign(torch.tensor([3, 1, 0, 2, 6, 5, 4]))
    two.load_state_dict({name: value.float() for name, value in one.state_dict().items()})
    assert two.assignment.tolist() == [3, 1, 0, 2, 6, 5, 4] and two.assignment.dtype == torch.int64


def test_average_of_checkpoints_is_refused_when_assignments_differ(make_head):
    one, two = make_head(), make_head()
    two.assign(torch.tensor([1, 0, 2, 3, 4, 5, 6]))
    average = {name: ((value.double() + two.state_dict()[name].double()) / 2).to(value.dtype)
               for name, value in one.state_dict().items()}
    with pytest.raises(RuntimeError, match='not an injection'):
        make_head().load_state_dict(average)
    same = {name: ((2 * value.double()) / 2).to(value.dtype) for name, value in one.state_dict().items()}
    make_head().load_state_dict(same)


def test_loading_with_assign_keeps_the_dtypes(make_head):
    head, donor = make_head(), make_head(seed=2)
    state = {name: value.bfloat16() if value.is_floating_point() else value.int()
             for name, value in donor.state_dict().items()}
    head.load_state_dict(state, assign=True)
    assert head.prototypes.dtype == torch.float32 and head.assignment.dtype == torch.int64
    assert head.prototypes.norm(dim=1).sub(1).abs().max() < 1e-6
    assert torch.allclose(head.prototypes, donor.prototypes, atol=1e-2)


def test_strict_loading_of_a_foreign_model_reports_as_torch_does(make_head):
    with pytest.raises(RuntimeError, match='Missing key'):
        make_head().load_state_dict({'weight': torch.zeros(1)})
    before = state_of(head := make_head())
    head.load_state_dict({'weight': torch.zeros(1)}, strict=False)
    assert_same_state(head, before)
    # A part of a head, say the neck alone, loads where the user says so.
    neck = {name: torch.ones_like(value) for name, value in before.items() if name.startswith('neck')}
    with pytest.raises(RuntimeError, match='Missing key'):
        make_head().load_state_dict(neck)
    head.load_state_dict(neck, strict=False)
    assert_same_state(head, {**before, **neck})


@pytest.mark.parametrize('copied', [
    copy.deepcopy,
    lambda head: pickle.loads(pickle.dumps(head)),
    lambda head: torch.load(io.BytesIO(saved(head)), weights_only=False),
])
def test_copies_are_whole_and_report_to_no_scheduler(make_head, generator, copied):
    head, modes = make_head(), []
    scheduler = AssignmentScheduler(head)
    head.training_view.on_mode = modes.append
    head.training_view.on_features, head.training_view.class_vectors = print, torch.zeros(7, 4)
    head.assign(torch.randperm(7, generator=generator))
    twin, x = copied(head), torch.randn(3, 12, generator=generator)
    assert_same_state(twin, state_of(head))
    assert twin.training_view.on_forward is None and head.training_view.on_forward is not None
    assert twin.training_view.on_features is None and twin.training_view.class_vectors is None
    assert head.training_view.class_vectors is not None
    twin(x)
    twin.eval()
    assert modes == []
    head.eval()
    assert modes == [False]
    head.train()
    with pytest.raises(RuntimeError, match='no embeddings'):
        scheduler.step(torch.zeros(3, dtype=torch.long))
    twin.assign(torch.arange(7))
    assert not torch.equal(twin.assignment, head.assignment)


def saved(head):
    buffer = io.BytesIO()
    torch.save(head, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize('bad', [torch.zeros(7, dtype=torch.long), torch.arange(6), torch.arange(1, 8),
                                 torch.arange(7.0)])
def test_assign_refuses_and_keeps(make_head, bad):
    head = make_head()
    with pytest.raises(ValueError, match='assignment'):
        head.assign(bad)
    assert head.assignment.tolist() == list(range(7))


@pytest.mark.parametrize('train_output', ['logits', 'embeddings'])
def test_compiles_whole_and_agrees_after_the_assignment_changed(make_head, generator, train_output):
    torch._dynamo.reset()
    head = make_head(train_output=train_output)
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    x, labels = torch.randn(6, 12, generator=generator), torch.arange(6)
    scheduler = AssignmentScheduler(compiled, interval=1, warmup_length=1)
    for _ in range(3):
        output = compiled(x)
        output.sum().backward()
        seen = scheduler._forwards.embeddings_of(output)
        assert torch.allclose(seen, head.embed(x), atol=1e-6)  # embed reports to nobody
        scheduler.step(labels, output)
        assert torch.allclose(compiled(x), head(x), atol=1e-6)
    assert head.assignment.tolist() != list(range(7))
    for mode in (True, False):
        compiled.train(mode)
        head.train(mode)
        assert torch.allclose(compiled(x), head(x), atol=1e-6)
    head.assign(torch.arange(7).flip(0))
    assert torch.allclose(compiled(x), head(x), atol=1e-6)


# ---- config


def test_config_rebuilds_the_head(make_head):
    head = make_head(num_prototypes=9, neck='linear_bn', learn_scale=True, seed=4)
    again = DL2PAHead.from_config(DL2PAConfig(**vars(head.config)))
    assert again.config == head.config and torch.equal(again.prototypes, head.prototypes)
    assert again.state_dict().keys() == head.state_dict().keys()
    with pytest.raises(AttributeError):
        head.config.dim = 5  # frozen


@pytest.mark.parametrize('recipe', ['placed', 'even', 'paper'])
def test_a_head_is_made_at_once_and_again_from_its_config(make_head, monkeypatch, recipe):
    """Where the whole work budget takes long, with a sixteenth of it."""
    monkeypatch.setattr('timm_dl2pa.prototypes.optimise._WORK_BUDGET', 2 * 10 ** 9)
    options = dict(num_classes=200, dim=12, recipe=recipe, seed=2, scale=9.0)
    points = make_prototypes(200, 12, method='quick', seed=2)
    head = make_head(**options)
    assert torch.equal(head.prototypes, points) and not torch.equal(points, make_prototypes(200, 12, seed=2))
    assert torch.equal(DL2PAHead.from_config(head.config).prototypes, points)
    again = make_head(**options)
    again.load_state_dict(head.state_dict())
    assert again.config == head.config and not head.config.own_prototypes
    assert torch.equal(head.with_classes(199).prototypes, make_prototypes(199, 12, method='quick', seed=2))


def test_own_prototypes(make_head):
    points = make_prototypes(9, 4, seed=7)
    head = make_head(prototypes=points)
    assert torch.equal(head.prototypes, points) and head.config.num_prototypes == 9
    points[0] = 0
    assert head.prototypes[0].norm() > 0.9  # a copy
    with pytest.raises(ValueError, match='prototypes of its own'):
        DL2PAHead.from_config(head.config)
    assert DL2PAHead.from_config(head.config, head.prototypes).config == head.config


@pytest.mark.parametrize('arguments, message', [
    (dict(num_classes=1), 'num_classes must be at least 2, not 1'),
    (dict(dim=0), 'dim must be at least 1, not 0'),
    (dict(in_features=0), 'in_features must be at least 1'),
    (dict(num_prototypes=6), 'num_prototypes must be at least num_classes=7, not 6'),
    (dict(neck='mlp'), "neck must be one of linear, linear_bn, none, not 'mlp'"),
    (dict(neck='none'), 'dim must be their number, 12, not 4'),
    (dict(scale=0), 'scale must be between'),
    (dict(scale=math.inf), 'scale must be between'),
    (dict(train_output='both'), 'train_output must be one of'),
    (dict(prototypes=torch.eye(4)), '7 classes need as many prototypes'),
    (dict(prototypes=torch.ones(7, 4)), 'unit rows'),
    (dict(prototypes=make_prototypes(7, 5)), 'prototypes have 5 dimensions, but dim=4'),
    (dict(prototypes=make_prototypes(8, 4), num_prototypes=9), 'prototypes has 8 rows, but num_prototypes=9'),
])
def test_bad_arguments(make_head, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_head(**arguments)


@pytest.mark.parametrize('arguments, message', [
    (dict(in_features=12.0), 'in_features must be int, not 12.0'),
    (dict(num_classes='7'), "num_classes must be int, not '7'"),
    (dict(num_classes=None), 'num_classes must be int, not None'),
    (dict(num_classes=np.float64(7)), 'num_classes must be int, not 7.0'),
    (dict(dim=True), 'dim must be int, not True'),
    (dict(dim=np.bool_(True)), 'dim must be int, not True'),
    (dict(num_prototypes=9.0), 'num_prototypes must be int, not 9.0'),
    (dict(scale=True), 'scale must be int or float, not True'),
    (dict(scale='9'), "scale must be int or float, not '9'"),
    (dict(scale=1e-60), 'scale must be between 1e-06 and 1e.06, not 1e-60'),
    (dict(scale=10 ** 400), 'scale must be between 1e-06 and 1e.06, not 1000'),
    (dict(scale=math.nan), 'scale must be between'),
    (dict(learn_scale=1), 'learn_scale must be bool, not 1'),
    (dict(seed=None), 'seed must be int, not None'),
    (dict(seed=-1), 'seed must be in 0'),
    (dict(seed=2 ** 63), 'seed must be in 0'),
    (dict(neck=['linear']), 'neck must be str'),
    (dict(train_output=None), 'train_output must be str, not None'),
    (dict(recipe=['paper']), 'recipe must be str'),
])
def test_arguments_of_the_wrong_type(make_head, arguments, message):
    given = {'in_features': 12, 'num_classes': 7, 'dim': 4, **arguments}
    own = {} if 'num_prototypes' in arguments else {'prototypes': make_prototypes(7, 4)}
    for make in (DL2PAConfig, make_head, lambda **given: make_head(**given, **own)):
        with pytest.raises(ValueError, match=message):
            make(**given)


def test_numbers_of_numpy_and_torch_become_pythons(make_head, tmp_path):
    plain = DL2PAConfig(12, 7, 4, num_prototypes=9, scale=2.5, learn_scale=False, seed=3, neck='linear')
    labels = np.array([0, 6, 3])
    config = DL2PAConfig(torch.tensor(12), labels.max() + 1, np.uint8(4), num_prototypes=torch.tensor([9])[0],
                         scale=np.float32(2.5), learn_scale=np.bool_(False), seed=np.int32(3), neck=np.str_('linear'))
    assert config == plain and list(map(type, vars(config).values())) == list(map(type, vars(plain).values()))
    head = make_head(num_classes=labels.max() + 1, dim=np.int64(4), scale=np.float32(2.5))
    assert load_head(head.save_pretrained(tmp_path)).config == head.config == make_head(scale=2.5).config
    assert DL2PAConfig(12, 7, 4, scale=3).scale == 3.0 and type(DL2PAConfig(12, 7, 4, scale=3).scale) is float


def test_made_on_the_meta_device(refuse_prototypes):
    donor = DL2PAHead(12, 7, 4)
    refuse_prototypes()
    with torch.device('meta'):
        head = DL2PAHead(12, 7, 4)
    assert head.prototypes.is_meta and head.neck[0].weight.is_meta and 'num_classes=7' in repr(head)
    assert head(torch.empty(3, 12, device='meta')).shape == (3, 7)
    head.load_state_dict(donor.state_dict(), assign=True)
    assert_same_state(head, state_of(donor))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(make_head, generator):
    x = torch.randn(6, 12, generator=generator)
    head, there = make_head(), make_head().cuda()
    assert there.prototypes.is_cuda and there.assignment.is_cuda
    assert torch.allclose(there(x.cuda()).cpu(), head(x), atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast('cuda', dtype):
            assert there(x.cuda()).dtype == torch.float32


@pytest.mark.parametrize('train_output', ['logits', 'embeddings'])
def test_embed_takes_maps_wherever_forward_does(make_head, train_output):
    """As a 1x1 convolution does: maps of features become maps of embeddings, pixel by pixel."""
    head = make_head(train_output=train_output)
    head.channels_first = True
    maps = torch.randn(2, 12, 3, 5)
    embeddings = head.embed(maps)
    assert embeddings.shape == (2, 4, 3, 5) and head.eval()(maps).shape == (2, 7, 3, 5)
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 12)
    head.channels_first = False
    assert torch.equal(embeddings.permute(0, 2, 3, 1).reshape(-1, 4), head.embed(rows))
    head.channels_first = True
    if train_output == 'embeddings':
        assert torch.equal(head.train()(maps), embeddings)


def test_label_names_are_declared(make_head, tmp_path):
    head = make_head()
    assert head.label_names is None and copy.deepcopy(head).label_names is None
    head.label_names = [f'class {index}' for index in range(7)]
    head.save_pretrained(tmp_path)
    assert DL2PAHead.from_pretrained(tmp_path).label_names == copy.deepcopy(head).label_names == head.label_names


def test_a_training_view_is_new_in_every_copy(make_head):
    head = make_head()
    head.training_view.on_forward = head.training_view.on_features = head.training_view.on_mode = print
    head.training_view.class_vectors, head.training_view.warming_up = torch.eye(7, 4), True
    empty = vars(TrainingView())
    for other in (copy.deepcopy(head), copy.copy(head), pickle.loads(pickle.dumps(head))):
        assert vars(other.training_view) == empty and other.training_view is not head.training_view
    assert head.warming_up and not any('training_view' in name for name in head.state_dict())


def test_class_vectors_of_a_warmup_move_with_the_head(make_head):
    head = make_head()
    AssignmentScheduler(head, recipe='even')
    assert not head.training_view.class_vectors.is_meta
    assert head.to('meta').training_view.class_vectors.is_meta


def test_a_compiled_forward_may_keep_the_buffers_for_its_backward(make_head):
    """Under autocast it does. Prototypes and assignment change between the two; the gradients are of those that the
    forward saw."""
    torch._dynamo.reset()
    head, x = make_head(), torch.randn(5, 12, requires_grad=True)
    compiled = torch.compile(head, backend='aot_eager', fullgraph=True)
    vectors = torch.nn.functional.normalize(torch.randn(7, 4), dim=1)
    with torch.autocast('cpu', torch.bfloat16):
        expected, = torch.autograd.grad(compiled(x).square().sum(), x)
        out = compiled(x)
    head.move_class_prototypes(vectors)
    head.assign(head.assignment.flip(0), head.prototypes)
    out.square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(head.prototypes, vectors) and head.assignment.tolist() == [6, 5, 4, 3, 2, 1, 0]
    # Elsewhere they change in place: recorded CUDA graphs read from where they were.
    head(x)
    kept = head.prototypes
    head.move_class_prototypes(vectors.flip(0))
    assert head.prototypes is kept


@pytest.mark.parametrize('neck', ['linear', 'linear_bn'])
def test_other_classes_keep_a_neck_whole_or_refuse(make_head, neck):
    head = make_head(neck=neck)
    assert all(torch.equal(value, head.neck.state_dict()[name])
               for name, value in head.with_classes(5).neck.state_dict().items())
    torch.nn.utils.parametrizations.weight_norm(head.neck if neck == 'linear' else head.neck[0])
    with pytest.raises(ValueError, match='remove_parametrizations'):
        head.with_classes(5)


def test_a_learned_scale_has_a_hundredth_of_its_gradient(make_head):
    head, x = make_head(neck='linear', learn_scale=True), torch.randn(5, 12)
    cosines = head.cosines(head.embed(x)).detach()
    assert float(head.current_scale().detach()) == pytest.approx(float(head.log_scale.detach().exp()), rel=1e-6)
    labels = torch.arange(5)
    torch.nn.functional.cross_entropy(head(x), labels).backward()
    log_scale = head.log_scale.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(log_scale.exp() * cosines, labels).backward()
    assert torch.allclose(head.log_scale.grad, 0.01 * log_scale.grad, rtol=1e-4) and log_scale.grad.abs() > 1e-3
    scripted = torch.jit.script(head)
    scripted.log_scale.grad = None
    torch.nn.functional.cross_entropy(scripted(x), labels).backward()
    assert torch.allclose(scripted.log_scale.grad, 0.01 * log_scale.grad, rtol=1e-4)
