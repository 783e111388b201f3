"""Which embeddings a step takes, where a loop has several forwards to a batch."""
import pytest
import torch
import torch.nn as nn
import torch.utils.checkpoint

from tests.helpers.scheduling import paper_rule

LABELS = torch.tensor([0, 1, 2, 3, 4, 5])


def rows(seed, count=6):
    return torch.randn(count, 12, generator=torch.Generator().manual_seed(seed))


def sums_of(head, x, labels=LABELS):
    """What the class sums must be after a batch."""
    return torch.zeros(7, 4).index_add_(0, labels, head.embed(x).detach())


def make(make_head, **options):
    head = make_head(**{'neck': 'linear', **options})
    return head, paper_rule(head, interval=100)


@pytest.mark.parametrize('train_output', ['logits', 'embeddings'])
def test_of_several_forwards_the_step_must_be_told_which(make_head, train_output):
    head, scheduler = make(make_head, train_output=train_output)
    x, u = rows(0), rows(1)
    output = head(x)
    head(u)
    with pytest.raises(RuntimeError, match=r'2 forwards in training mode came .*embeddings=output'):
        scheduler.step(LABELS)
    assert not scheduler.class_means.sums.any() and scheduler.steps == 0
    scheduler.step(LABELS, embeddings=output)
    assert torch.equal(scheduler.class_means.sums, sums_of(head, x))
    with pytest.raises(RuntimeError, match='found no embeddings'):
        scheduler.step(LABELS)


def test_a_loop_that_catches_the_error_goes_on_with_the_next_batch(make_head):
    head, scheduler = make(make_head)
    head(rows(0)), head(rows(1))
    with pytest.raises(RuntimeError, match='2 forwards'):
        scheduler.step(LABELS)
    head(rows(2))
    scheduler.step(LABELS)
    assert torch.equal(scheduler.class_means.sums, sums_of(head, rows(2)))


def test_sharpness_aware_minimisation_counts_the_first_forward(make_head):
    """SAM: a second forward of the same batch at other weights."""
    head, scheduler = make(make_head)
    x = rows(0)
    for _ in range(3):
        output = head(x)
        expected = head.embed(x).detach()
        nn.functional.cross_entropy(output, LABELS).backward()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.1)
        nn.functional.cross_entropy(head(x), LABELS).backward()
        scheduler.class_means.reset()
        scheduler.step(LABELS, embeddings=output)
        assert torch.equal(scheduler.class_means.sums, torch.zeros(7, 4).index_add_(0, LABELS, expected))


@pytest.mark.parametrize('part, chosen', [
    (slice(0, 6), slice(0, 6)), (slice(6, 12), slice(6, 12)), (slice(0, 12, 2), slice(0, 12, 2))])
def test_fixmatch_counts_the_labelled_part_of_a_joint_batch(make_head, part, chosen):
    """FixMatch and consistency losses: labelled and unlabelled samples in one forward, or in several."""
    head, scheduler = make(make_head)
    joint = rows(0, 12)
    output = head(joint)
    with pytest.raises(ValueError, match='6 samples, but there are 12'):
        scheduler.step(LABELS)
    scheduler.step(LABELS, embeddings=output[part])
    assert torch.equal(scheduler.class_means.sums, sums_of(head, joint[chosen]))


def test_gradient_accumulation_takes_a_step_for_each_forward(make_head):
    head, scheduler = make(make_head)
    for seed in range(4):
        nn.functional.cross_entropy(head(rows(seed)), LABELS).backward()
        scheduler.step(LABELS)
    assert scheduler.steps == 4
    assert torch.allclose(scheduler.class_means.sums, sum(sums_of(head, rows(seed)) for seed in range(4)), atol=1e-6)


@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_repeats_no_forward(make_head, reentrant):
    head, scheduler = make(make_head)
    x = rows(0).requires_grad_()
    output = torch.utils.checkpoint.checkpoint(head, x, use_reentrant=reentrant)
    nn.functional.cross_entropy(output, LABELS).backward()
    scheduler.step(LABELS)
    assert torch.equal(scheduler.class_means.sums, sums_of(head, x))


def test_embeddings_of_ones_own_are_taken(make_head):
    head, scheduler = make(make_head)
    x = rows(0)
    scheduler.step(LABELS, embeddings=3 * head.embed(x))
    assert torch.allclose(scheduler.class_means.sums, sums_of(head, x), atol=1e-6)


def test_copies_of_the_output_cannot_be_told_apart(make_head):
    for dim in (4, 7):  # where d = C, logits have the shape of embeddings
        head, scheduler = make(make_head, dim=dim)
        output = head(rows(0))
        for given in (output.clone(), output[[0, 1, 2, 3, 4, 5]], output.double(), output.long(), output[:, :3], 3):
            with pytest.raises(ValueError, match='embeddings must be'):
                scheduler.step(LABELS, embeddings=given)
        assert scheduler.steps == 0


def test_no_number_of_forwards_fills_the_memory(make_head):
    head, scheduler = make(make_head)
    first = head(rows(0))
    for seed in range(1, 8):
        output = head(rows(seed))
    assert len(scheduler._forwards) <= 4
    with pytest.raises(RuntimeError, match='at least 4 forwards'):
        scheduler.step(LABELS)
    with pytest.raises(ValueError, match='embeddings must be'):
        scheduler.step(LABELS, embeddings=first)
    scheduler.step(LABELS, embeddings=output)


@pytest.mark.slow
def test_compiled_forwards_are_told_apart(make_head):
    torch._dynamo.reset()
    head, scheduler = make(make_head)
    compiled = torch.compile(head, fullgraph=True, backend='aot_eager')
    for _ in range(3):
        output = compiled(rows(0))
        compiled(rows(1))
        with pytest.raises(RuntimeError, match='2 forwards'):
            scheduler.step(LABELS)
        scheduler.class_means.reset()
        scheduler.step(LABELS, embeddings=output)
        assert torch.allclose(scheduler.class_means.sums, sums_of(head, rows(0)), atol=1e-6)
