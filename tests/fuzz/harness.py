"""Fuzzing: good inputs are damaged by seed, and only documented errors may come out.

`fuzz` runs for some seconds. By hand, for longer, or from the seed that a failure names:

    TIMM_DL2PA_FUZZ_SECONDS=600 pytest -n 0 tests/fuzz
    TIMM_DL2PA_FUZZ_SEED=1234 pytest -n 0 tests/fuzz -k head
"""
import copy
import json
import os
import signal
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

SECONDS = float(os.environ.get('TIMM_DL2PA_FUZZ_SECONDS', 4))
FIRST_SEED = int(os.environ.get('TIMM_DL2PA_FUZZ_SEED', 0))
CASE_LIMIT = 60  # seconds; a loaded machine may take many times what an idle one takes

# What a loader must not do: run, unpickle, or reach out. See the table of audit events in Python's documentation.
_FORBIDDEN = ('exec_program', 'os.exec', 'os.fork', 'os.posix_spawn', 'os.startfile', 'os.system', 'pickle.find_class',
              'socket.connect', 'subprocess.Popen')
_watch: dict[str, Any] = {'on': False, 'seen': []}
_hooked = threading.Lock()

STRANGE = (
    None, True, False, 0, -1, 1, 2, 7, 2 ** 31, 2 ** 63, 2 ** 64, -2 ** 63, 10 ** 30, 0.0, -0.0, 0.5, 1e-60, 1e300,
    float('nan'), float('inf'), '', ' ', '0', 'nan', 'linear', 'paper', '../../etc/passwd', 'hf-hub:evil/model',
    'local-dir:/etc', 'file:///etc/passwd', '\x00', '\ud800', 'a' * 5000, '__class__', '{0.__class__}', '%s%n', [], {},
    [None], [[]], [0] * 20, {'a': {}}, {'__reduce__': ['os.system', 'true']},
)
NAMES = ('pretrained', 'checkpoint_path', 'file', 'url', '__class__', 'depth', 'layers', 'evil')


class TooLong(Exception):
    """A case took more than `CASE_LIMIT` seconds."""


def fuzz(
        make_case: Callable[[Random], Any],
        target: Callable[[Any], Any],
        errors: tuple[type[Exception], ...],
        seconds: float = SECONDS,
) -> int:
    """Damage inputs and hand them to a target until the time is over.

    Args:
        make_case: Makes an input from a random generator.
        target: Takes it, and checks what comes of it by assertions.
        errors: The documented errors of the target. Any other is a failure, which names the seed.
        seconds: How long.

    Returns:
        The number of cases.
    """
    def try_one(random: Random) -> None:
        case = make_case(random)
        with suppress(*errors), nothing_executed(), _time_limit(), warnings.catch_warnings():
            warnings.simplefilter('ignore')
            target(case)

    return search(try_one, seconds)


def search(try_one: Callable[[Random], Any], seconds: float = SECONDS) -> int:
    """Call `try_one(random)` with one seed after the other until the time is over, and return how often.

    Raises:
        AssertionError: It raised something; the seed is named.
    """
    end, seed = time.monotonic() + seconds, FIRST_SEED
    while time.monotonic() < end or seed == FIRST_SEED:
        try:
            try_one(Random(seed))
        except BaseException as error:
            raise AssertionError(f'seed {seed} (TIMM_DL2PA_FUZZ_SEED): {type(error).__name__}: {error}') from error
        seed += 1
    return seed - FIRST_SEED


@contextmanager
def nothing_executed() -> Iterator[None]:
    """Context manager that fails where a program is started, an object unpickled or a connection opened within it."""
    with _hooked:
        if not _watch.get('hook'):
            sys.addaudithook(_audit)  # for good: Python takes none away
            _watch['hook'] = True
    _watch.update(on=True, seen=[])
    try:
        yield
    finally:
        _watch['on'] = False
    assert not _watch['seen'], f'this happened: {_watch["seen"]}'


def _audit(event: str, arguments: tuple) -> None:
    if _watch['on'] and event in _FORBIDDEN:
        _watch['seen'].append((event, repr(arguments)[:200]))
        raise AssertionError(f'{event}: {arguments!r:.200}')


@contextmanager
def _time_limit() -> Iterator[None]:
    if not hasattr(signal, 'setitimer') or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise TooLong(f'a case took more than {CASE_LIMIT} s')

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, CASE_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- damage


def damaged_bytes(content: bytes, random: Random) -> bytes:
    """Flip, cut out, double, overwrite or cut off some bytes."""
    content = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 5))):
        begin = random.randrange(len(content) + 1)
        end = min(len(content), begin + random.choice((1, 2, 8, 100)))
        how = random.randrange(5)
        if how == 0 and begin < len(content):
            content[begin] ^= 1 << random.randrange(8)
        elif how == 1:
            del content[begin:end]
        elif how == 2:
            content[begin:begin] = content[begin:end]
        elif how == 3:
            content[begin:end] = random.randbytes(end - begin)
        elif how == 4 and random.random() < 0.3:
            del content[begin:]
    return bytes(content)


def damaged_json(value: Any, random: Random) -> Any:
    """Replace, remove, add, swap or wrap values anywhere in a tree of JSON values, of which a copy is returned."""
    root = {'root': copy.deepcopy(value)}
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_places(root))
        holder, key = random.choice(places)
        how = random.randrange(8)
        old = holder[key]
        if how < 4:
            holder[key] = copy.deepcopy(random.choice(STRANGE))
        elif how == 4 and len(places) > 1 and holder is not root:
            del holder[key]
        elif how == 5:
            other, other_key = random.choice(places)
            holder[key] = copy.deepcopy(other[other_key])
        elif how == 6:
            holder[key] = random.choice(([old], {'a': old}, str(old), [old] * 3))
        elif isinstance(old, dict):
            old[random.choice(NAMES)] = copy.deepcopy(random.choice((*STRANGE, [10 ** 6] * 4)))
        elif isinstance(old, (int, float)) and not isinstance(old, bool):
            holder[key] = random.choice((-old, old + 1, old * 10 ** 6, float(old), old / 3))
        elif isinstance(old, str) and old:
            with suppress(UnicodeDecodeError):
                holder[key] = damaged_bytes(old.encode('utf-8', 'surrogatepass'), random).decode()
    return root['root']


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the holder and key of each value in a tree."""
    queue = [tree]
    while queue:
        holder = queue.pop()
        for key, value in (list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))):
            yield holder, key
            if isinstance(value, (dict, list)):
                queue.append(value)


def damaged_safetensors(content: bytes, random: Random) -> bytes:
    """Damage the bytes of a safetensors file, or its header, of which most then still is one; or its numbers."""
    how = random.randrange(4)
    if how == 0:
        return damaged_bytes(content, random)
    size = struct.unpack('<Q', content[:8])[0]
    header, data = json.loads(content[8:8 + size]), bytearray(content[8 + size:])
    if how == 1:
        text = json.dumps(damaged_json(header, random)).encode()
        return struct.pack('<Q', len(text)) + text + bytes(data)
    name = random.choice([name for name in header if name != '__metadata__'])
    begin, end = header[name]['data_offsets']
    if how == 2 and end > begin:  # a number that no training gives
        values = [struct.pack('<f', number) for number in (float('nan'), float('inf'), -1.0, 0.0, 1e30, 1000.0)]
        position = begin + 4 * random.randrange(max(1, (end - begin) // 4))
        data[position:position + 4] = random.choice((*values, random.randbytes(4)))
        data = data[:len(content) - 8 - size]
    else:  # another dtype of the same size
        of_size = {1: ['U8', 'I8', 'BOOL', 'F8_E4M3', 'F8_E5M2'], 2: ['F16', 'BF16', 'I16', 'U16'],
                   4: ['F32', 'I32', 'U32'], 8: ['F64', 'I64', 'U64', 'C64']}
        same = next(names for names in of_size.values() if header[name]['dtype'] in names)
        header[name]['dtype'] = random.choice(same)
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + bytes(data)


def damaged_folder(files: dict[str, bytes], random: Random, digest: Callable[[dict, bytes], Any]) -> dict[str, bytes]:
    """Damage `config.json`, `model.safetensors` or both; or leave one of them out.

    Args:
        files: The contents by name.
        random: The generator.
        digest: Writes the sha256 of the weights into the config, as one would who means harm. It is called for most.
    """
    config, weights = json.loads(files['config.json']), files['model.safetensors']
    which = random.choice(('config', 'config', 'weights', 'weights', 'both', 'bytes', 'missing'))
    if which in ('weights', 'both'):
        weights = damaged_safetensors(weights, random)
    if random.random() < 0.9:
        digest(config, weights)
    if which in ('config', 'both'):
        config = damaged_json(config, random)
    text = json.dumps(config).encode()
    if which == 'bytes':
        text = damaged_bytes(text, random)
    found = {'config.json': text, 'model.safetensors': weights}
    if which == 'missing':
        del found[random.choice(list(found))]
    return found
