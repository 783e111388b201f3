"""One table of options: signatures, flags and saved configs agree with it."""
import inspect
from dataclasses import fields
from typing import get_args

import pytest

from timm_dl2pa import AssignmentScheduler, DL2PAConfig, DL2PAHead, wrap_dl2pa
from timm_dl2pa.head.neck import NECKS, make_neck
from timm_dl2pa.models.registry import dl2pa
from timm_dl2pa.options import KINDS, LOSSES, PREFIX, PluginOptions, names_of
from timm_dl2pa.prototypes.codes import CODES
from timm_dl2pa.prototypes.make import Method
from timm_dl2pa.recipes import RECIPES, NeckName, RecipeName, WarmupName
from timm_dl2pa.scheduling import WARMUPS, Duration
from timm_dl2pa.values import is_kind

DEFAULTS = {spec.name: spec.default for spec in fields(PluginOptions)}


@pytest.mark.parametrize('function', [wrap_dl2pa, DL2PAHead.__init__])
def test_the_head_takes_its_options_with_the_tables_defaults(function):
    parameters = inspect.signature(function).parameters
    for name in names_of('head'):
        if name == 'dim' and function is not wrap_dl2pa:
            continue  # a head alone has no default dimension
        assert parameters[name].default == DEFAULTS[name], name
    # What else they take says where the head goes, and what it is trained for.
    others = {'self', 'model', 'head', 'pinned', 'num_classes', 'in_features', 'train_output', 'device', 'dtype'}
    assert parameters.keys() - set(names_of('head')) <= others


def test_the_scheduler_takes_its_options_with_the_tables_defaults():
    parameters = inspect.signature(AssignmentScheduler).parameters
    for name in names_of('scheduler'):
        assert parameters[name].default == DEFAULTS[name], name
    # The recipe is the head's; the length of the training is the script's.
    assert parameters.keys() - set(names_of('scheduler')) == {'model', 'recipe', 'total', 'ignore_index'}


def test_the_choices_are_those_of_what_takes_them():
    choices = {spec.name: set(spec.metadata['choices']) for spec in fields(PluginOptions)}
    assert choices['warmup'] == {'none', *WARMUPS} and choices['neck'] == set(NECKS)


def test_the_words_that_type_checkers_know_are_those_that_there_are():
    assert get_args(RecipeName) == tuple(RECIPES) and set(get_args(WarmupName)) == {*WARMUPS, 'none'}
    assert {type(make_neck(name, 4, 4)).__name__ for name in get_args(NeckName)} == {
        'Identity', 'Linear', '_LinearBatchNorm'}
    assert set(CODES) < set(get_args(Method))
    # Losses are made by their names in timm_scripts/test_criterion.py; other words have no table but their type.


def test_a_saved_config_has_a_kind_for_every_value():
    assert {spec.name for spec in fields(DL2PAConfig)} == KINDS.keys() - {'prototypes'}
    config = DL2PAConfig(12, 7, 4)
    assert all(is_kind(getattr(config, name), KINDS[name]) for name in vars(config))


def test_the_registry_takes_the_heads_options_and_no_others():
    for name in {*names_of('scheduler'), 'loss', 'prime'}:
        with pytest.raises(ValueError, match=f'{PREFIX}{name}: no such option'):
            dl2pa(dl2pa_backbone='test_resnet', **{PREFIX + name: 1})
    model = dl2pa(dl2pa_backbone='test_resnet', num_classes=7, dl2pa_dim=4, dl2pa_recipe='even', dl2pa_neck='linear')
    assert (model.get_classifier().config.recipe, model.get_classifier().config.neck) == ('even', 'linear')


@pytest.mark.parametrize('recipe', RECIPES.values(), ids=lambda recipe: recipe.name)
def test_what_a_recipe_sets_exists(recipe):
    assert recipe.loss in LOSSES and recipe.warmup in {'none', *WARMUPS}
    assert str(Duration.of(recipe.warmup_length)) and PluginOptions(recipe=recipe.name).loss == recipe.loss
    config = DL2PAConfig(12, 7, 4, recipe=recipe.name)
    assert (config.neck, config.learn_scale) == (recipe.neck, recipe.learn_scale)


def test_a_recipe_sets_what_is_not_given_and_nothing_else():
    assert PluginOptions(recipe='paper').loss_arguments() == {'reduction': 'sum', 'weight': 1.0}
    assert PluginOptions(recipe='paper', loss_weight=2.0).loss_arguments() == {'reduction': 'sum', 'weight': 2.0}
    assert PluginOptions(recipe='placed', loss='squared_cosine').loss_arguments() == {}
    assert PluginOptions(recipe='paper', loss='criterion').head_arguments()['learn_scale'] is None
    # Losses of distances give a scale no gradient.
    assert PluginOptions(loss='dot_regression').head_arguments()['learn_scale'] is False
    given = DL2PAConfig(12, 7, 4, recipe='paper', neck='linear_bn', learn_scale=True)
    assert (given.neck, given.learn_scale, given.scale) == ('linear_bn', True, 4.0)
    assert not DL2PAConfig(12, 7, 4, scale=9.0).learn_scale
    assert not DL2PAConfig(12, 7, 4, train_output='embeddings').learn_scale
