"""What is heard of a head's forwards, and by whom."""
import pytest
import torch
import torch.nn as nn

from timm_dl2pa import AssignmentScheduler


def replica_of(head):
    """As nn.DataParallel makes one for each of its devices."""
    replica = head._replicate_for_data_parallel()
    replica._modules.update(head._modules)
    return replica


def test_replicas_of_data_parallel_are_refused_where_somebody_listens(make_head):
    head, x = make_head(), torch.randn(4, 12)
    assert torch.equal(replica_of(head)(x), head(x))
    AssignmentScheduler(head)
    with pytest.raises(RuntimeError, match=r'nn.DataParallel.*use DistributedDataParallel'):
        replica_of(head)(x)
    assert replica_of(head.eval())(x).shape == (4, 7)


def test_listeners_get_plain_tensors_and_the_scale(make_head):
    class Named(torch.Tensor):
        pass

    heard = []
    head = make_head(learn_scale=True, scale=3.0)
    head.training_view.on_features = heard.append
    head.training_view.on_forward = lambda embeddings, output: heard.extend([embeddings, output])
    head(torch.randn(4, 12).as_subclass(Named))
    assert [type(tensor) for tensor in heard] == [torch.Tensor] * 3
    assert head.training_view.scale.shape == () and head.training_view.scale.item() == pytest.approx(3)


@pytest.mark.parametrize('head_options', [dict(scale=5.0), dict(learn_scale=True)])
def test_buffers_that_were_cast_are_float32_again(make_head, head_options):
    """As FSDP casts them, past the module."""
    head, x = make_head(neck='linear_bn', **head_options), torch.randn(4, 12)
    expected = head(x)
    for buffer in head.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.bfloat16()
    with pytest.warns(UserWarning, match='cast to torch.bfloat16.* leave buffer_dtype out'):
        again = head(x)
    assert torch.allclose(again, expected, atol=0.1) and head.config.own_prototypes
    assert {buffer.dtype for buffer in head.buffers()} == {torch.float32, torch.int64}
    assert torch.allclose(head.prototypes.norm(dim=1), torch.ones(7), atol=1e-6)
    nn.functional.cross_entropy(head(x), torch.arange(4)).backward()


def test_a_learned_scale_is_no_scalar_and_decays_no_weight(make_head):
    """FSDP2 shards no parameter without dimensions; timm decays those of at least two."""
    from timm.optim import param_groups_weight_decay
    head = make_head(learn_scale=True)
    assert head.log_scale.shape == (1,) == head.config.tensor_shapes()['log_scale']
    without, _ = param_groups_weight_decay(head, weight_decay=0.1)
    assert without['weight_decay'] == 0 and any(parameter is head.log_scale for parameter in without['params'])


def test_a_batch_of_one_sample_is_refused_in_training(make_head):
    head = make_head(neck='linear_bn')
    with pytest.raises(ValueError, match='drop_last=True'):
        head(torch.randn(1, 12))
    assert head(torch.randn(1, 3, 12)).shape == (1, 3, 7)  # tokens are rows
    head.neck[1].eval()
    assert head(torch.randn(1, 12)).shape == (1, 7)
    assert make_head()(torch.randn(1, 12)).shape == (1, 7)


def test_batch_norm_whose_parameters_alone_are_cast(make_head):
    """As FSDP casts them for a forward; torch itself refuses the mixture."""
    head, cast = (make_head(neck='linear_bn') for _ in range(2))
    for parameter in cast.parameters():
        parameter.data = parameter.bfloat16()
    x = torch.randn(8, 12)
    for mode in (True, False):
        assert torch.allclose(cast.train(mode)(x.bfloat16()), head.train(mode)(x), atol=0.5)
    assert torch.allclose(cast.neck[1].running_mean, head.neck[1].running_mean, atol=1e-2)
    assert cast.neck[1].num_batches_tracked == 1 and cast.neck[1].running_mean.dtype == torch.float32
    cast.train()(x.bfloat16()).sum().backward()
    assert all(parameter.grad.dtype == torch.bfloat16 for parameter in cast.parameters())
