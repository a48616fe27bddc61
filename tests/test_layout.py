"""The house rules that can be read off the source: imports go down, files stay short, gin stays in configure.py."""

import ast
import fnmatch
import graphlib
import os
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
MAX_LINES = 350

# A module imports from the floors below its own. One that is named nowhere here fails the test: give it a floor.
FLOORS = [
    {'', 'controls', 'errors', 'types', 'leaves', 'masked', 'memory', 'stderr', 'sharded', 'startup', 'survivor'},
    {
        'losses', 'advantages', 'kl', 'shaping', 'ensembles', 'layers', 'lora', 'schedules', 'resume',
        'accumulate', 'topology', 'distributed', 'flash', 'bucketing', 'unpadding', 'unmarked', 'oddities',
        'intervals',
    },
    {
        'networks', 'networks.*', 'partitioning', 'features', 'train_state', 'intercept', 'averaging',
        'algorithms', 'algorithms.*', 'streams', 'logprobs', 'providers', 't5x_names', 'rows', 'token_files',
    },
    {'data', 'lexicon', 'sampling', 'checkpoints', 'rundir', 'interop', 'interop.*', 'tasks', 'tasks.*'},
    {'base', 'lineage', 'vocabulary', 'rl', 'anchors', 'texts', 'task_metrics'},
    {
        'rewards', 'evaluate', 'calibration', 'runs', 'rebase', 'rl_programs',
        'judging', 'judging.rubrics', 'judging.winrate', 'judging.endpoint', 'judging.mentions', 'judging.replies',
        'judging.statements', 'judging.reading', 'judging.flags', 'judging.cautions',
    },
    {
        'train_sft', 'train_reward', 'train_policy', 'infer', 'exchange', 'average', 'inspect_task', 'report',
        'report.*',
        'judging.models', 'judging.judge', 'sweep', 'sweep.*',
    },
    {'plan', 'plan.*'},
    {'configure'},
    {'main', '__main__'},
]  # fmt: skip

# Imports within a floor, with the reason for each.
SAME_FLOOR = {
    ('algorithms.*', 'algorithms'): 'each says what it is',
    ('kl', 'losses'): 'k3 is made of a ratio too',
    ('interop.*', 'interop.*'): 'readers of one format share what they know of it',
    ('tasks.*', 'tasks.*'): 'a data set is registered by one module and read by others',
    ('networks.decoder', 'networks.branches'): 'its attention',
    ('token_files', 'streams'): 'rows that a stream reads',
    ('networks.*', 'networks.chosen'): 'which tokens of a run go on',
    ('lexicon', 'interop.*'): 'a vocabulary may be named by its path',
    ('interop.chat_template', 'rundir'): 'a template may be named by a run that reads with it',
    ('data', 'lexicon'): 'what tasks are read with',
    ('vocabulary', 'lineage'): 'what weights bring is looked up where a run came from',
    ('sweep*', 'sweep.*'): 'the grid, the queue that runs it, the tables and plots of what came out',
    ('plan*', 'plan.*'): 'the programs, the compiler, the table',
    ('judging.models', 'infer'): 'a judge is a finished run too',
    ('judging.statements', 'judging.mentions'): 'one table of signs',
    ('judging.reading', 'judging.*'): 'a reply is made plain, then signed, then read',
    ('report*', 'report.*'): 'one page, written by several files',
    ('__main__', 'main'): 'python -m perl_jax is the command line',
}

# Only the networks are made of layers; configure.py lets gin name RopeScaling.
ONLY_FOR = {'layers': r'networks\..*|configure|interop.hf_config|interop.gguf_keys'}

# Modules that are imported under another name than their distribution's, or that come with another one.
DISTRIBUTIONS = {
    'absl': 'absl-py',
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
    """Returns the module's floor, or None where the table does not know it."""
    found = [i for i, names in enumerate(FLOORS) if any(fnmatch.fnmatchcase(module, name) for name in names)]
    assert len(found) <= 1, f'{module} stands on floors {found}'
    return found[0] if found else None


def matches(module, other, pair):
    return fnmatch.fnmatchcase(module, pair[0]) and fnmatch.fnmatchcase(other, pair[1])


def test_every_module_has_a_floor():
    unknown = [str(path.relative_to(ROOT)) for module, path in MODULES.items() if floor(module) is None]
    assert not unknown, f'give these a floor in FLOORS: {unknown}'


def test_imports_go_down():
    wrong = []
    for module, path in MODULES.items():
        for other in set(own_imports(path)) - {''}:
            if floor(module) is None or (other in MODULES and floor(other) is None):
                continue  # the test above says so
            if other not in MODULES:
                wrong.append(f'{module} imports perl_jax.{other}, which does not exist')
            elif floor(other) > floor(module):
                wrong.append(f'{module} (floor {floor(module)}) imports {other} (floor {floor(other)})')
            elif floor(other) == floor(module) and not any(matches(module, other, pair) for pair in SAME_FLOOR):
                wrong.append(f'{module} imports {other} of its own floor {floor(other)}')
            elif other in ONLY_FOR and not re.fullmatch(ONLY_FOR[other], module):
                wrong.append(f'{module} imports {other}, which is for {ONLY_FOR[other]} alone')
    assert not wrong, '\n'.join(['', *sorted(wrong)])


def test_imports_form_no_circle():
    graph = {module: set(own_imports(path)) - {''} for module, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the circle in it


def test_same_floor_list_is_not_stale():
    pairs = [(module, other) for module, path in MODULES.items() for other in own_imports(path)]
    stale = [pair for pair in SAME_FLOOR if not any(matches(*found, pair) for found in pairs)]
    assert not stale, f'no longer imported, so strike them from SAME_FLOOR: {stale}'


def test_files_stay_short():
    long = {path.name: n for path in MODULES.values() if (n := len(path.read_text().splitlines())) > MAX_LINES}
    assert not long, f'split these; {MAX_LINES} lines is the limit: {long}'


def test_gin_and_flags_only_in_configure():
    wrong = []
    for module, path in MODULES.items():
        for name in imports(path):
            if module != 'configure' and re.match(r'gin(\.|$)|absl\.(app|flags)(\.|$)', name):
                wrong.append(f'{module} imports {name}')
    assert not wrong, f'the library knows nothing of gin or flags, only configure.py does: {wrong}'


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
