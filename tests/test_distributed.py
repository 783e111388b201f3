"""Results and errors of rank 0 in every process."""
import pytest
import torch
import torch.distributed as dist

from tests.helpers.processes import run_ranks
from timm_dl2pa.distributed import solve_on_rank_0


class Unlike(Exception):
    """It is pickled, and cannot be made again of what was pickled."""

    def __init__(self, name, count):
        super().__init__(f'{count} of {name}')


class Unpicklable(Exception):
    def __reduce__(self):
        raise TypeError('never')


def fail(error):
    raise error


FUNCTIONS = {
    'result': lambda: torch.arange(3),
    'error': lambda: fail(ValueError('class 17')),
    'no pickle': lambda: fail(Unpicklable('class 18')),
    'no way back': lambda: fail(Unlike('class', 19)),
    'interrupt': lambda: fail(KeyboardInterrupt()),
    'exit': lambda: fail(SystemExit(3)),
    'result without pickle': lambda: lambda: 0,
    'result again': lambda: 'done',
}


def in_process(rank, folder):
    found = {}
    for name, function in FUNCTIONS.items():
        try:
            found[name] = solve_on_rank_0(function if rank == 0 else None)
        except BaseException as error:
            found[name] = type(error).__name__, str(error)
        dist.barrier()
    torch.save(found, f'{folder}/{rank}.pt')


@pytest.mark.slow
def test_all_processes_hear_what_became_of_rank_0(tmp_path):
    run_ranks(in_process, str(tmp_path), folder=tmp_path, limit=120)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert torch.equal(first.pop('result'), torch.arange(3)) and torch.equal(second.pop('result'), torch.arange(3))
    assert first.pop('result again') == second.pop('result again') == 'done'
    assert first.pop('error') == second.pop('error') == ('ValueError', 'class 17')
    # Rank 0 raises its own error, also where the others cannot have it.
    assert {name: kind for name, (kind, _) in first.items() if 'result' not in name} == {
        'no pickle': 'Unpicklable', 'no way back': 'Unlike', 'interrupt': 'KeyboardInterrupt', 'exit': 'SystemExit'}
    for name, said in [('no pickle', 'Unpicklable: class 18'), ('no way back', 'Unlike: 19 of class'),
                       ('interrupt', 'KeyboardInterrupt'), ('exit', 'SystemExit: 3')]:
        assert second[name] == ('RuntimeError', second[name][1]) and said in second[name][1]
    assert first['result without pickle'][0] != 'function' and 'pickle' in second['result without pickle'][1]


def test_alone_it_is_a_call():
    function = FUNCTIONS['result without pickle']
    assert solve_on_rank_0(function)() == 0
    with pytest.raises(KeyboardInterrupt):
        solve_on_rank_0(FUNCTIONS['interrupt'])
