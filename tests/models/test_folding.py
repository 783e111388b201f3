import copy

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file

from tests.helpers.processes import python
from tests.helpers.stand_in import train
from timm_dl2pa import DL2PAHead, fold_dl2pa, save_model, wrap_dl2pa
from timm_dl2pa.cli import main
from timm_dl2pa.head import heads_of
from timm_dl2pa.timm_scripts import plugged_in

pytestmark = pytest.mark.timm

CLASSES = 9


def trained(name='test_resnet', classes=CLASSES, model_args=None, **kwargs):
    """A wrapped model whose batch norms, scale and assignment are not as they were made."""
    torch.manual_seed(0)
    model = wrap_dl2pa(timm.create_model(name, num_classes=classes, **(model_args or {})), 4, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.uniform_(module.bias, -1, 1)
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for head in heads_of(model):
        if isinstance(head.neck, nn.Linear):
            nn.init.uniform_(head.neck.bias, -1, 1)
        head.assign(torch.randperm(len(head.prototypes))[:classes])
    for head in heads_of(model)[1:]:
        head.assign(heads_of(model)[0].assignment)
    return model.eval()


# Linear classifiers, 1x1 convolutions (dla34), a batch norm (levit_256d) and a hidden layer (caformer) before them.
MODELS = [('test_resnet', {}), ('dla46_c', {}), ('levit_256d', dict(img_size=32)), ('caformer_s18', {})]


@pytest.mark.parametrize('name, model_args', MODELS)
@pytest.mark.parametrize('kwargs', [{}, dict(neck='linear_bn', learn_scale=True, num_prototypes=11)])
def test_same_order_in_timms_own_shapes(name, model_args, kwargs):
    model = trained(name, model_args=model_args, **kwargs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(6, 3, 32, 32)
    random_state = torch.get_rng_state()
    plain = fold_dl2pa(model)
    assert torch.equal(random_state, torch.get_rng_state())
    fresh = timm.create_model(name, num_classes=CLASSES, **model_args)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in fresh.state_dict().items()}
    fresh.load_state_dict(plain.state_dict())
    with torch.no_grad():
        logits, folded = model(x), fresh.eval()(x)
    length = (folded / logits)[:, :1]
    assert (length > 0).all() and length.std() > 0  # one number an image, and not the same for all images
    assert torch.allclose(folded, length * logits, rtol=1e-3, atol=1e-4 * folded.abs().max().item())
    assert not any(isinstance(module, DL2PAHead) for module in plain.modules())
    assert 'timm_dl2pa' not in ' '.join(type(module).__module__ for module in plain.modules())
    assert not any('dl2pa' in type(value).__module__ for value in vars(plain).values())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()) and isinstance(
        model.get_classifier(), DL2PAHead)


@pytest.mark.parametrize('name, model_args', [*MODELS, ('deit_tiny_distilled_patch16_224', dict(img_size=32))])
def test_normalized_is_exact(name, model_args):
    model = trained(name, model_args=model_args, neck='linear_bn')
    x = torch.randn(6, 3, 32, 32)
    plain = fold_dl2pa(model, normalize=True)
    with torch.no_grad():
        assert torch.allclose(plain(x), model(x), atol=1e-4)
        assert torch.allclose(plain.forward_head(plain.forward_features(x)), model(x), atol=1e-4)
    assert not any(type(module).__module__.startswith('timm_dl2pa') for module in plain.modules())


def test_without_a_neck_and_without_length():
    model = wrap_dl2pa(timm.create_model('test_resnet', num_classes=5), 96, neck='none').eval()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(fold_dl2pa(model)(x).argmax(1), model(x).argmax(1))
    head = fold_dl2pa(model, normalize=True).fc
    assert not head(torch.zeros(2, 96)).any() and not model.fc(torch.zeros(2, 96)).any()


def test_several_classifiers_are_measured_or_refused():
    model = trained('deit_tiny_distilled_patch16_224', model_args=dict(img_size=32))
    with pytest.raises(ValueError, match=r'2 classifiers.*give images'):
        fold_dl2pa(model)
    x = torch.randn(32, 3, 32, 32)
    plain = fold_dl2pa(model.train(), images=x)
    assert model.training and not model.get_classifier()[0].neck._forward_hooks
    model.eval(), plain.eval()
    with torch.no_grad():
        logits, folded = model(x), plain(x)
    assert plain.fold_agreement == (logits.argmax(1) == folded.argmax(1)).float().mean().item()
    assert isinstance(plain.head, nn.Linear) and isinstance(plain.head_dist, nn.Linear)
    # Each classifier was divided by the mean length of its embeddings.
    assert 0.5 < (folded.norm() / logits.norm()) < 2
    # An embedding that is much longer in one of the two classifiers does not drown the other.
    nn.init.zeros_(model.head.neck[1].bias), model.head.neck[1].weight.data.mul_(1000)
    again = fold_dl2pa(model, images=x)
    with torch.no_grad():
        assert (again(x) - model(x)).norm() < 0.5 * model(x).norm()


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match='nothing to fold'):
        fold_dl2pa(timm.create_model('test_resnet'))


def test_after_a_forward_with_gradient():
    """LeViT then keeps tensors that deepcopy refuses."""
    model = wrap_dl2pa(timm.create_model('levit_256d', num_classes=5, img_size=32).eval(), 3)
    x = torch.randn(2, 3, 32, 32)
    assert model(x).requires_grad
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    assert torch.equal(fold_dl2pa(model)(x).argmax(1), model(x).argmax(1))
    wrap_dl2pa(model, 4)
    assert model.get_classifier().dim == 4


WITHOUT_US = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'timm_dl2pa':
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import timm, torch
model = timm.create_model('test_resnet', num_classes={classes}, checkpoint_path={path!r}).eval()
assert 'timm_dl2pa' not in sys.modules and type(model.fc) is torch.nn.Linear
torch.save(model(torch.load({images!r})), {logits!r})
"""


def without_us(path, images, folder, classes=CLASSES):
    torch.save(images, folder / 'images.pt')
    code = WITHOUT_US.format(classes=classes, path=str(path), images=str(folder / 'images.pt'),
                             logits=str(folder / 'logits.pt'))
    python(code, cwd=folder)
    return torch.load(folder / 'logits.pt')


@pytest.mark.slow
def test_command_folds_a_training(tmp_path, capsys):
    with plugged_in():
        task = train(tmp_path, dl2pa_dim=3, dl2pa_neck='linear_bn', dl2pa_num_prototypes=6)
    model = task.get_trainable_module().eval()
    arguments = ['fold', str(tmp_path / 'last.pth.tar')]
    options = ['--model', 'test_resnet', '--model-kwargs', 'dl2pa_neck=linear_bn']
    assert main([*arguments, str(tmp_path / 'plain.pth'), *options]) == 0
    said = capsys.readouterr().out
    assert "timm.create_model('test_resnet', num_classes=5" in said
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(without_us(tmp_path / 'plain.pth', images, tmp_path, 5).argmax(1), model(images).argmax(1))

    main([*arguments, str(tmp_path / 'exact.safetensors'), '--normalize', *options])
    assert load_file(tmp_path / 'exact.safetensors')['fc.0.weight'].shape[0] == 4  # d + 1
    for wrong, message in [([str(tmp_path / 'plain.pth')], 'exists already'),
                           ([str(tmp_path / 'x.pth'), '--use-ema'], 'no averaged weights'),
                           ([str(tmp_path / 'x.pth'), '--model', 'test_vit'], "does not fit 'test_vit'")]:
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *wrong])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / 'x.pth').exists()


@pytest.mark.slow
def test_command_folds_a_folder(tmp_path, capsys):
    model = trained()
    main(['fold', str(save_model(model, tmp_path / 'model')), str(tmp_path / 'plain.safetensors')])
    images = torch.randn(8, 3, 32, 32)
    assert torch.equal(without_us(tmp_path / 'plain.safetensors', images, tmp_path).argmax(1), model(images).argmax(1))


def test_command_refuses_several_classifiers_and_plain_models(tmp_path, capsys):
    model = wrap_dl2pa(timm.create_model('deit_tiny_distilled_patch16_224', num_classes=3, img_size=32), 4)
    folder = save_model(model, tmp_path / 'model', model_args=dict(img_size=32))
    torch.save(timm.create_model('test_resnet').state_dict(), tmp_path / 'plain.pth')
    for source, message in [(folder, '2 classifiers'), (tmp_path / 'plain.pth', 'has no DL2PA head')]:
        with pytest.raises(SystemExit):
            main(['fold', str(source), str(tmp_path / 'out.pth')])
        assert message in capsys.readouterr().err
    main(['fold', str(folder), str(tmp_path / 'out.pth'), '--normalize'])
    assert 'which timm alone cannot load' in capsys.readouterr().out
