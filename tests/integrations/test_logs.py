"""log_update with the real TensorBoard and wandb, and with functions."""
import json

import pytest

from tests.helpers.processes import python
from timm_dl2pa import AssignmentUpdate
from timm_dl2pa.integrations.logs import log_update

FIRST = AssignmentUpdate(step=40, epoch=1, moved=3, objective_before=61.0, objective=64.5, seconds=0.01, event='placed')
SECOND = AssignmentUpdate(step=80, epoch=2, moved=0, objective_before=65.0, objective=65.0, seconds=0.02, left_out=4)


def test_a_function_gets_values_and_step():
    rows = []
    for update, step in ((FIRST, None), (None, None), (SECOND, 7)):
        log_update(update, lambda values, step: rows.append((step, values)), step)
    assert [step for step, _ in rows] == [40, 7]
    assert rows[0][1] == {'dl2pa/placed/moved': 3, 'dl2pa/placed/objective_before': 61.0, 'dl2pa/placed/seconds': 0.01,
                          'dl2pa/placed/objective': 64.5, 'dl2pa/placed/left_out': 0}
    assert rows[1][1]['dl2pa/resolve/left_out'] == 4


@pytest.mark.parametrize('update', [None, FIRST])
def test_what_is_no_writer_is_refused(update):
    with pytest.raises(TypeError, match=r'writer must be a SummaryWriter of TensorBoard.*not str'):
        log_update(update, 'logs')


def test_tensorboard(tmp_path):
    pytest.importorskip('tensorboard', reason='needs tensorboard: pip install "timm-dl2pa[tensorboard]"')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter(str(tmp_path)) as writer:
        for update in (FIRST, None, SECOND):
            log_update(update, writer)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars('dl2pa/placed/objective')] == [(40, 64.5)]
    assert [(event.step, event.value) for event in events.Scalars('dl2pa/resolve/left_out')] == [(80, 4)]


WANDB = """
import glob, json, sys, wandb
from wandb.proto import wandb_internal_pb2
from timm_dl2pa import AssignmentUpdate
from timm_dl2pa.integrations.logs import log_update

run = wandb.init(project='test', dir=sys.argv[1], settings=wandb.Settings(console='off'))
for step, moved in ((10, 3), (20, None), (30, 4)):
    run.log({'loss': step / 10}, step=step)  # the owner's own steps
    log_update(None if moved is None else AssignmentUpdate(8 * step, 1, moved, 1.0, 2.0, 0.1), wandb.run)
run.finish()

with open(glob.glob(f'{sys.argv[1]}/wandb/offline-run-*/*.wandb')[0], 'rb') as file:
    data = file.read()[7:]
while len(data) > 7:  # records of LevelDB's log format, none longer than a block: checksum, length, kind, content
    length = int.from_bytes(data[4:6], 'little')
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data[7:7 + length])
    data = data[7 + length:]
    if record.HasField('history'):
        print(json.dumps({'/'.join(item.nested_key) or item.key: json.loads(item.value_json)
                          for item in record.history.item}))
"""


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    pytest.importorskip('wandb', reason='needs wandb: pip install "timm-dl2pa[wandb]"')
    printed = python(WANDB, str(tmp_path), environment={'WANDB_MODE': 'offline', 'WANDB_SILENT': 'true',
                                                        'HOME': str(tmp_path)})
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith('{')]
    assert [(row['_step'], row.get('loss')) for row in rows] == [(10, 1), (20, 2), (30, 3)]  # the owner's rows
    moved = [(row.get('dl2pa/step'), row.get('dl2pa/resolve/moved')) for row in rows]
    assert moved == [(80, 3), (None, None), (240, 4)]
