"""The house rules that can be read off the source: imports go down, files stay short, gin stays in cli/."""

import ast
import collections
import graphlib
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
MAX_LINES = 350

# A folder is an idea. Its modules import each other, what lies in perl_jax/ itself, and folders named before theirs.
FLOORS = [
    'kernels', 'models', 'optim', 'parallel', 'interop', 'runs', 'tokenizers', 'tasks', 'data', 'rl', 'rewards',
    'evals', 'train', 'tools', 'cli',
]  # fmt: skip
MAX_FILES = 12  # a folder, subfolders apart
FACE = ''  # perl_jax/__init__.py names what is public, and imports each when it is asked for
TOP = {FACE, '__main__', 'errors', 'json_files', 'masked', 'printing', 'settings', 'sharded', 'trees', 'types'}

# Imports of a later folder, with the reason for each.
UPWARD = {
    ('__main__', 'cli.main'): 'python -m perl_jax is the command line',
    ('tasks.preprocessors', 'data.rows'): 'a prompt is cut there as every data set cuts its own',
}

# Only the networks are made of layers; gin may name RopeScaling, and readers of configs make one.
ONLY_FOR = {
    'models.layers': r'models\..*',
    'models.attention.rotary': r'models\..*|cli\.configurables|interop\.hf_config|interop\.gguf_keys',
    'models.attention.segmented': r'models\..*',
}

# Names that say nothing of what they are bound to. CONTRIBUTING.md: a name says what a thing is.
EMPTY_NAMES = {
    'asked', 'both', 'every', 'found', 'given', 'have', 'held', 'here', 'how', 'it', 'kept', 'made', 'mend',
    'now', 'of', 'one', 'ours', 'own', 'part', 'pick', 'said', 'seen', 'some', 'that', 'theirs', 'there', 'wanted',
    'what', 'who', 'whole',
}  # fmt: skip

# Modules that are imported under another name than their distribution's, or that come with another one.
DISTRIBUTIONS = {
    'absl': 'absl-py',
    'annotated_types': 'annotated-types',
    'gin': 'gin-config',
    'google': 'seqio',  # protobuf, by way of TensorFlow
    'ml_dtypes': 'jax',
    'orbax': 'orbax-checkpoint',
    'scipy': 'jax',
    'sentencepiece': 'seqio',
    'tensorflow': 'seqio',
    'tensorflow_datasets': 'seqio',
    'tensorflow_text': 'seqio',
    'tensorstore': 'orbax-checkpoint',
}


def sources():
    """Yields (module's name below perl_jax, path), through the symlink perl_jax/tasks."""
    for folder, folders, files in os.walk(ROOT / 'perl_jax', followlinks=True):
        folders[:] = sorted(set(folders) - {'__pycache__', 'gin'})
        for file in sorted(files):
            if file.endswith('.py'):
                path = pathlib.Path(folder, file)
                parts = path.relative_to(ROOT / 'perl_jax').with_suffix('').parts
                yield '.'.join(parts[:-1] if parts[-1] == '__init__' else parts), path


MODULES = dict(sources())


def imports(path):
    """Yields the full dotted name of everything that the file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}:{node.lineno}: write the import in full, from perl_jax'
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def own_imports(path):
    """Yields the names below perl_jax of our modules that the file imports."""
    for name in imports(path):
        package, _, rest = name.partition('.')
        if package == 'perl_jax' and rest:
            yield rest if rest in MODULES else rest.rpartition('.')[0]


def floor(module):
    """Returns the place of the module's folder in FLOORS, -1 for what lies in perl_jax/ itself."""
    return -1 if module in TOP else FLOORS.index(module.partition('.')[0])


def test_every_folder_has_a_floor():
    unknown = {module for module in MODULES if module not in TOP and module.partition('.')[0] not in FLOORS}
    assert not unknown, f'put these into a folder of FLOORS: {unknown}'


def test_folders_stay_small():
    count = collections.Counter(path.parent for path in MODULES.values() if path.stem != '__init__')
    large = {folder.name: n for folder, n in count.items() if n > MAX_FILES}
    assert not large, f'a folder has at most {MAX_FILES} files: {large}'


def test_imports_go_down():
    wrong = []
    for module, path in MODULES.items():
        for other in set(own_imports(path)) - {''}:
            if other not in MODULES:
                wrong.append(f'{module} imports perl_jax.{other}, which does not exist')
            elif floor(other) > floor(module) and module != FACE and (module, other) not in UPWARD:
                wrong.append(f'{module} imports {other}, whose folder stands after its own')
            elif other in ONLY_FOR and not re.fullmatch(ONLY_FOR[other], module):
                wrong.append(f'{module} imports {other}, which is for {ONLY_FOR[other]} alone')
    assert not wrong, '\n'.join(['', *sorted(wrong)])


def test_imports_form_no_circle():
    graph = {module: set(own_imports(path)) - {''} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle in it


def test_upward_list_is_not_stale():
    pairs = {(module, other) for module, path in MODULES.items() for other in own_imports(path)}
    assert not set(UPWARD) - pairs, f'no longer imported, so strike them from UPWARD: {set(UPWARD) - pairs}'


def test_files_stay_short():
    long = {path.name: n for path in MODULES.values() if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f'split these; {MAX_LINES} lines is the limit: {long}'


def test_gin_and_flags_only_in_the_command_line():
    wrong = []
    for module, path in MODULES.items():
        for name in imports(path):
            if not module.startswith('cli.') and re.match(r'gin(\.|$)|absl\.(app|flags)(\.|$)', name):
                wrong.append(f'{module} imports {name}')
    assert not wrong, f'the library knows nothing of gin or flags, only cli/ does: {wrong}'


def test_third_party_modules_are_declared():
    setup = (ROOT / 'setup.py').read_text()
    missing = {}
    for module, path in MODULES.items():
        for name in {name.partition('.')[0] for name in imports(path)} - sys.stdlib_module_names - {'perl_jax'}:
            if not re.search(rf"'{re.escape(DISTRIBUTIONS.get(name, name))}\b", setup):
                missing.setdefault(name, []).append(module)
    assert not missing, f'declare these in setup.py (or name their distribution here): {missing}'


def test_no_file_that_must_never_be():
    # gin/__init__.py would hide the gin-config package from whoever runs in this folder.
    forbidden = [*ROOT.glob('gin/**/*.py'), *(path for path in MODULES.values() if path.stem in ('utils', 'helpers'))]
    assert not forbidden, f'remove: {forbidden}'


def test_tasks_and_gin_are_links():
    # Real folders inside the package would be second copies; a task module under two names registers its tasks twice.
    for name in ('tasks', 'gin'):
        link = ROOT / 'perl_jax' / name
        assert os.readlink(link) == f'../{name}', f'{link} has to be a symlink to ../{name}'


def test_no_test_is_hidden_by_another_of_its_name():
    hidden = {}
    for path in (ROOT / 'tests').rglob('test_*.py'):
        names = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
        hidden |= {f'{path.name}::{name}': names.count(name) for name in names if names.count(name) > 1}
    assert not hidden, f'rename one of these: {hidden}'


def bindings(tree):
    """Yields (name, line) of every variable, argument, function and class that a file binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node.lineno


def test_names_say_what_they_are_bound_to():
    empty = [
        f'{path}:{line}: {name}'
        for path in [*MODULES.values(), *(ROOT / 'benchmarks').rglob('*.py'), *(ROOT / 'examples').rglob('*.py')]
        for name, line in bindings(ast.parse(path.read_text()))
        if name.strip('_') in EMPTY_NAMES
    ]
    assert not empty
