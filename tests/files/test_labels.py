"""Names of the classes: what people hand over, and every door that takes them."""
import json
from collections import UserList

import numpy as np
import pytest
import timm
import torch

from timm_dl2pa import (
    DL2PAHead,
    load_head,
    load_model,
    push_head_to_hub,
    push_model_to_hub,
    save_model,
    wrap_dl2pa,
)
from timm_dl2pa.files.card import Facts, card_files
from timm_dl2pa.files.labels import read_label_names

NAMES = ['emu', 'cat', 'fox']
GOOD = {
    'list': NAMES,
    'tuple': tuple(NAMES),
    'array': np.array(NAMES),
    'objects': np.array(NAMES, dtype=object),
    'strings of numpy': [np.str_(name) for name in NAMES],
    'another sequence': UserList(NAMES),
    'id2label': {0: 'emu', 1: 'cat', 2: 'fox'},
    'id2label of JSON': {'0': 'emu', '1': 'cat', '2': 'fox'},
    'id2label in another order': {2: 'fox', 0: 'emu', 1: 'cat'},
    'id2label of numpy': {np.int64(index): np.str_(name) for index, name in enumerate(NAMES)},
    'class_to_idx': {'cat': 1, 'emu': 0, 'fox': 2},
    'label2id of tensors': {'cat': torch.tensor(1), 'emu': np.int32(0), 'fox': 2},
}
BAD = {
    'string': ('abc', "3 names, one for each class, not 'abc': give a list of strings in the order"),
    'bytes': (b'abc', 'give a list of strings'),
    'set': (set(NAMES), 'give a list of strings'),
    'keys': ({'a': 0, 'b': 1, 'c': 2}.keys(), 'give a list of strings'),
    'generator': ((name for name in NAMES), 'give a list of strings'),
    'number': (3, 'not 3: give a list of strings'),
    'two': (NAMES[:2], '3 names, one for each class, not 2'),
    'none': ([], '3 names, one for each class, not 0'),
    'numbers': ([1, 2, 3], 'that of class 0 is 1, which is no string'),
    'one number': (['a', 'b', 3], 'that of class 2 is 3, which is no string'),
    'array of numbers': (np.arange(3), 'that of class 0 is 0, which is no string'),
    'matrix': (np.array([NAMES]), 'give a list of strings'),
    'string of numpy': (np.array('abc'), 'give a list of strings'),
    'half a character': (['a', 'b', '\udcff'], r"that of class 2, '\\udcff', is no valid Unicode"),
    'gap': ({0: 'a', 1: 'b', 3: 'c'}, r'from the indices 0\.\.2 to names'),
    'from one': ({'a': 1, 'b': 2, 'c': 3}, r'from the indices 0\.\.2 to names'),
    'twice': ({'a': 0, 'b': 1, 'c': 1}, r'each once'),
    'index twice': ({0: 'a', '0': 'b', 1: 'c', 2: 'd'}, r'each once'),
    'names to names': ({'a': 'x', 'b': 'y', 'c': 'z'}, r'from the indices 0\.\.2 to names'),
    'truths': ({False: 'a', True: 'b', 2: 'c'}, r'from the indices 0\.\.2 to names'),
    'id2label of two': ({0: 'a', 1: 'b'}, '3 names, one for each class, not 2'),
    'empty mapping': ({}, '3 names, one for each class, not 0'),
    'numbers by index': ({0: 'a', 1: 'b', 2: 7}, 'that of class 2 is 7'),
}


@pytest.mark.parametrize('form', GOOD)
def test_forms_that_are_understood(form):
    names = read_label_names(GOOD[form], 3)
    assert names == NAMES and {type(name) for name in names} == {str} and names is not GOOD[form]


@pytest.mark.parametrize('form', BAD)
def test_what_is_no_names(form):
    given, message = BAD[form]
    with pytest.raises(ValueError, match=f'label_names must be .*{message}'):
        read_label_names(given, 3)


def test_digits_are_names_too():
    """The folders of digits: {'0': 0, '1': 1, ...}, and an id2label whose labels are other digits."""
    assert read_label_names({'2': 0, '1': 1, '0': 2}, 3) == ['2', '1', '0']
    assert read_label_names({'2': '0', '1': '1', '0': '2'}, 3) == ['2', '1', '0']
    assert read_label_names(None, 3) is None


def test_every_door_of_a_head(hub, tmp_path):
    head, by_name = DL2PAHead(96, 3, 2), GOOD['class_to_idx']
    assert load_head(head.save_pretrained(tmp_path / 'a', label_names=by_name)).label_names == NAMES
    head.label_names = GOOD['id2label of JSON']
    assert load_head(head.save_pretrained(tmp_path / 'b')).label_names == NAMES
    config = json.loads((tmp_path / 'b' / 'config.json').read_text())
    (tmp_path / 'b' / 'config.json').write_text(json.dumps({**config, 'label_names': {'0': 'a', '2': 'b', '1': 'c'}}))
    assert load_head(tmp_path / 'b').label_names == ['a', 'c', 'b']
    assert wrap_dl2pa(timm.create_model('test_resnet'), head=head).label_names == NAMES
    push_head_to_hub(head, 'me/head', token='hf_writer')
    assert load_head('me/head').label_names == NAMES
    assert 'Classes: emu, cat, fox.' in hub.files('me/head')['README.md'].decode()
    card = card_files(head, 'me/head', Facts(label_names=by_name), kind='head')['README.md']
    assert b'Classes: emu, cat, fox.' in card
    head.label_names = 'abc'
    hub.requests.clear()
    for door in (lambda: head.save_pretrained(tmp_path / 'new'), lambda: push_head_to_hub(head, 'me/other'),
                 lambda: wrap_dl2pa(timm.create_model('test_resnet'), head=head),
                 lambda: card_files(head, 'me/head', Facts(label_names='abc'), kind='head')):
        with pytest.raises(ValueError, match=r"label_names must be 3 names, one for each class, not 'abc'"):
            door()
    assert not (tmp_path / 'new').exists() and not hub.requests


@pytest.mark.timm
def test_every_door_of_a_model(hub, tmp_path):
    model, by_name = wrap_dl2pa(timm.create_model('test_resnet', num_classes=3), 2), GOOD['class_to_idx']
    assert load_model(save_model(model, tmp_path / 'model', label_names=by_name)).label_names == NAMES
    push_model_to_hub(model, 'me/model', label_names=np.array(NAMES), token='hf_writer')
    assert timm.create_model('hf-hub:me/model', pretrained=True).label_names == NAMES
    overlay = dict(label_names=by_name)
    made = timm.create_model('dl2pa', dl2pa_backbone='test_resnet', num_classes=3, pretrained_cfg_overlay=overlay)
    assert made.label_names == made.pretrained_cfg['label_names'] == NAMES
    hub.requests.clear()
    for door in (lambda: save_model(model, tmp_path / 'new', label_names='abc'),
                 lambda: push_model_to_hub(model, 'me/other', label_names='abc'),
                 lambda: timm.create_model('dl2pa', dl2pa_backbone='test_resnet', num_classes=3,
                                           pretrained_cfg_overlay=dict(label_names='abc'))):
        with pytest.raises(ValueError, match=r"label_names must be 3 names, one for each class, not 'abc'"):
            door()
    with pytest.raises(ValueError, match='3 names, one for each class, not 0'):
        save_model(model, tmp_path / 'new', label_names=[])
    assert not (tmp_path / 'new').exists() and not hub.requests


@pytest.mark.timm
def test_other_classes_have_no_names(tmp_path):
    model = load_model(save_model(wrap_dl2pa(timm.create_model('test_resnet', num_classes=3), 2), tmp_path,
                                  label_names=NAMES))
    assert timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=4).label_names is None
    assert timm.create_model(f'local-dir:{tmp_path}', num_classes=4).label_names is None
    assert load_model(save_model(model, tmp_path)).label_names == NAMES
    model.reset_classifier(3)
    assert model.label_names == NAMES
    model.reset_classifier(4)
    assert load_model(save_model(model, tmp_path)).label_names is None
    model.label_names = list('abcd')
    assert wrap_dl2pa(model, 2, num_classes=5).label_names is None
