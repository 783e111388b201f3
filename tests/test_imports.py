"""The order of the package's rooms: no module imports from a higher one, and none imports itself by way of others."""
import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import timm_dl2pa

# From the lowest to the highest. A room is a sub-package or a module.
ROOMS = [
    'version', 'values', 'distributed', 'prototypes', 'assignment', 'recipes', 'options', 'flags', 'files', 'head',
    'evaluation', 'losses', 'scheduling', 'models', 'timm_scripts', 'integrations',
]
# These see everything, and nothing else sees them.
DOORS = ['cli', 'demo', 'embed', 'evaluate', 'finetune', 'parsers', 'plugin', '__main__', '__init__']
PACKAGE = 'timm_dl2pa'


@dataclass(frozen=True)
class Import:
    """One name that a module takes from another: `from target import name`, or `import target` (name is None)."""

    source: str
    line: int
    target: str
    name: str | None = None
    local: str | None = None  # the name that it has in the source

    def __str__(self) -> str:
        what = self.target if self.name is None else f'{self.target}.{self.name}'
        return f'{self.source}, line {self.line}, imports {what}'


def read_package(folder: Path, package: str) -> dict[str, ast.Module]:
    """The syntax trees of all modules, by dotted name; a package's is that of its `__init__`."""
    trees = {}
    for path in sorted(folder.rglob('*.py')):
        parts = [package, *path.relative_to(folder).with_suffix('').parts]
        name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        trees[name] = ast.parse(path.read_text(), str(path))
    return trees


def imports_of(module: str, tree: ast.Module, is_package: bool) -> Iterator[Import]:
    """All imports, those inside functions and those by `importlib.import_module` with a constant too."""
    parents = module.split('.') if is_package else module.split('.')[:-1]

    def absolute(name: str, level: int) -> str:
        start = parents[:len(parents) - level + 1] if level else []
        return '.'.join([*start, name] if name else start)

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(module, node.lineno, absolute(node.module or '', node.level), alias.name,
                             alias.asname or alias.name)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', None)
            name = node.args[0].value
            if called in ('import_module', '__import__') and isinstance(name, str):
                level = len(name) - len(name.lstrip('.'))
                yield Import(module, node.lineno, absolute(name.lstrip('.'), level))


class Package:
    """The modules of a package and what they import."""

    def __init__(self, folder: Path, name: str = PACKAGE):
        self.name = name
        self.trees = read_package(folder, name)
        self.packages = {module.rpartition('.')[0] for module in self.trees if '.' in module}
        self.imports = [found for module, tree in self.trees.items()
                        for found in imports_of(module, tree, module in self.packages)]
        self.exported = {(found.source, found.local): found for found in self.imports if found.source in self.packages}

    def is_ours(self, module: str) -> bool:
        return module == self.name or module.startswith(self.name + '.')

    def source(self, found: Import) -> str:
        """The module that is imported: a sub-module, or the one where a sub-package's `__init__` has the name from."""
        target, name = found.target, found.name
        while name is not None:
            if f'{target}.{name}' in self.trees:
                return f'{target}.{name}'
            exported = self.exported.get((target, name))
            # What the whole package exports comes from its __init__, which is above all rooms.
            if exported is None or target == self.name or not self.is_ours(exported.target):
                return target
            target, name = exported.target, exported.name
        return target

    def room(self, module: str) -> str:
        """`timm_dl2pa.head.config` is of the room `head`; the package's own `__init__` is a room as well."""
        return module.split('.')[1] if '.' in module else '__init__'

    def rank(self, module: str) -> int:
        room = self.room(module)
        return len(ROOMS) if room in DOORS else ROOMS.index(room)

    def upward(self) -> list[str]:
        """Imports from a higher room; the package's own `__init__` is above all."""
        return [str(found) for found in self.imports
                if self.is_ours(found.target) and self.rank(self.source(found)) > self.rank(found.source)]

    def edges(self) -> dict[str, set[str]]:
        """Which modules each module imports. What an `__init__` does for others to find is left out."""
        edges: dict[str, set[str]] = {module: set() for module in self.trees}
        for found in self.imports:
            if self.is_ours(found.target) and found.source not in self.packages:
                edges[found.source].add(self.source(found))
        return edges

    def circles(self) -> list[list[str]]:
        """Ways from a module back to itself, the shortest ones; a module that is on one has none of its own."""
        edges, circles = self.edges(), []
        for start in edges:
            if any(start in circle for circle in circles):
                continue
            ways, seen = [[start]], set()
            while ways:
                way = ways.pop(0)
                following = edges.get(way[-1], set())
                if start in following:
                    circles.append([*way, start])
                    break
                for module in sorted(following - seen):
                    seen.add(module)
                    ways.append([*way, module])
        return circles

    def outside(self, forbidden: str, rooms: list[str]) -> list[str]:
        """Where modules of these rooms import `forbidden` or a part of it."""
        def is_forbidden(found: Import) -> bool:
            whole = found.target if found.name is None else f'{found.target}.{found.name}'
            return f'{whole}.'.startswith(forbidden + '.')

        return [str(found) for found in self.imports if self.room(found.source) in rooms and is_forbidden(found)]


@pytest.fixture(scope='module')
def package():
    return Package(Path(timm_dl2pa.__file__).parent)


def test_every_module_has_a_room(package):
    assert {package.room(module) for module in package.trees} <= {*ROOMS, *DOORS}
    assert len(package.trees) > 30


def test_no_module_imports_from_a_higher_room(package):
    upward = package.upward()
    assert not upward, '\n'.join(upward)


def test_no_module_imports_a_door(package):
    doors = set(DOORS) - {'__init__'}
    assert not [str(found) for found in package.imports if package.is_ours(found.target)
                and package.room(package.source(found)) in doors and package.room(found.source) not in DOORS]


def test_no_circle(package):
    circles = package.circles()
    assert not circles, '\n'.join(map(' -> '.join, circles))


def test_timm_is_known_from_models_on(package):
    assert not package.outside('timm', ROOMS[:ROOMS.index('models')])


def test_timms_tasks_are_known_from_timm_scripts_on(package):
    assert not package.outside('timm.task', ROOMS[:ROOMS.index('timm_scripts')])


# --- the test of the tests


@pytest.mark.parametrize('file, code, upward', [
    ('head/head.py', 'from ..models import wrapping', ['line 1, imports timm_dl2pa.models.wrapping']),
    ('head/head.py', 'from ..models.wrapping import wrap', ['line 1, imports timm_dl2pa.models.wrapping.wrap']),
    ('head/head.py', 'def push():\n    from ..models.wrapping import wrap', ['line 2, imports']),
    ('head/head.py', 'import timm_dl2pa.models.wrapping', ['imports timm_dl2pa.models.wrapping']),
    ('head/head.py', "import importlib\nimportlib.import_module('timm_dl2pa.models.wrapping')", ['line 2, imports']),
    ('head/head.py', "from importlib import import_module\nimport_module('..models', 'x')", ['line 2, imports']),
    ('head/head.py', 'from timm_dl2pa import wrap_dl2pa', ['imports timm_dl2pa.wrap_dl2pa']),
    ('head/head.py', 'import timm_dl2pa', ['imports timm_dl2pa']),
    ('head/head.py', 'from .. import cli', ['imports timm_dl2pa.cli']),
    ('head/head.py', 'from .. import prototypes, models', ['imports timm_dl2pa.models']),
    ('head/head.py', 'from .. import make_prototypes', ['imports timm_dl2pa.make_prototypes']),
    ('head/head.py', 'from ..prototypes import make_prototypes\nfrom ..prototypes.make import make_prototypes', []),
    ('models/wrapping.py', 'from ..head import head\nfrom .. import version', []),
    ('cli.py', 'from . import wrap_dl2pa', []),
])
def test_upward_imports_are_seen(tmp_path, file, code, upward):
    found = small_package(tmp_path, {file: code}).upward()
    assert len(found) == len(upward) and all(part in line for part, line in zip(upward, found))


def test_circles_are_seen(tmp_path):
    files = {'head/head.py': 'from .files import save', 'head/files.py': 'def save():\n    from .head import Head'}
    names = [f'timm_dl2pa.head.{name}' for name in ('files', 'head', 'files')]
    assert small_package(tmp_path, files).circles() == [names]
    # By way of the package's __init__, from which a name comes back to the module that imports it.
    files = {'prototypes/make.py': 'from .other import help', 'prototypes/other.py': 'from . import make_prototypes'}
    assert len(small_package(tmp_path / 'second', files).circles()) == 1
    files['prototypes/other.py'] = 'from . import something'
    assert not small_package(tmp_path / 'third', files).circles()


@pytest.mark.parametrize('code, timm, task', [
    ('import timm', 1, 0), ('from timm.models import create_model', 1, 0), ('def f():\n    import timm.task', 1, 1),
    ('from timm import task', 1, 1), ('import timmy', 0, 0), ('from timm.task.task import TrainingTask', 1, 1),
])
def test_imports_of_timm_are_seen(tmp_path, code, timm, task):
    package = small_package(tmp_path, {'head/head.py': code, 'models/wrapping.py': 'import timm, timm.task'})
    assert [len(package.outside(name, ['head'])) for name in ('timm', 'timm.task')] == [timm, task]


def small_package(folder: Path, files: dict[str, str]) -> Package:
    files = {
        '__init__.py': 'from .models.wrapping import wrap_dl2pa\nfrom .prototypes import make_prototypes',
        'version.py': '', 'cli.py': '', 'head/__init__.py': '', 'head/head.py': '', 'models/__init__.py': '',
        'models/wrapping.py': '', 'prototypes/__init__.py': 'from .make import make_prototypes as make_prototypes',
        'prototypes/make.py': 'def make_prototypes(): ...', **files}
    for name, code in files.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    return Package(folder / PACKAGE)
