"""Small runs of the toy recipes by way of the command line, in this process, for the tests that look at whole runs."""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import pathlib
import sys
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import traced
from jax.experimental.compilation_cache import compilation_cache

from perl_jax.cli import configure, main
from perl_jax.data import datasets
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base
from perl_jax.tasks import toy as grammar_tasks
from perl_jax.train import loop

# What is compiled once serves every later run of all processes that test; little is gained by compiling well.
CACHE = os.path.join(os.environ['XDG_CACHE_HOME'], 'toy_runs')
SETTINGS = {
    'jax_compilation_cache_dir': CACHE,
    'jax_persistent_cache_min_compile_time_secs': 0,
    'jax_persistent_cache_min_entry_size_bytes': -1,
    'jax_disable_most_optimizations': True,
}
ENVIRONMENT = {name.upper(): str(value) for name, value in SETTINGS.items()}

toy_rows, read_rows = {}, datasets._read_rows_in_memory

SMALL = (
    '--gin.TRAIN_STEPS=6', '--gin.EVAL_PERIOD=2', '--gin.BATCH_SIZE=4', '--gin.EVAL_EXAMPLES=8',
    '--gin.train/data.DatasetConfig.limit=64',
)  # fmt: skip


def quoted(name, value):
    """A gin flag whose value is a string."""
    return f"--gin.{name}='{value}'"


def toy(phase, model_dir, *flags):
    """The command line of a small run; of two flags for one name the later counts."""
    return [phase, f'--gin_file=recipes/toy_{phase}.gin', quoted('MODEL_DIR', model_dir), *SMALL, *flags]


@dataclasses.dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def line(self):
        """The one line that an error is said in, under the run's first lines and progress bar if it had begun."""
        assert self.code == 2, self
        *bar, line = self.err.strip().splitlines()
        first_lines = 'it/s', 'step', 'intervals over', 'warning: TASKMASTER_DIR=', 'nothing reads the macro'
        assert all(any(text in x for text in first_lines) for x in bar if x), self.err
        assert line.startswith('perl_jax: ') and 'Traceback' not in self.out, self
        return line


def perl(*argv):
    """`perl_jax ARGV` in this process, which is afterwards as it was before."""
    out, err = io.StringIO(), io.StringIO()
    with settings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.cli([str(word) for word in argv])
    return Result(code, out.getvalue(), err.getvalue())


def ran(*argv):
    """`perl`, which has to succeed."""
    result = perl(*argv)
    assert result.code == 0, result.err
    return result


def read_once(task, config, kind):
    """The rows of a toy task, which no test changes: reading them with TensorFlow takes a fourth of a run's time."""
    if not task.name.startswith('toy_') or not isinstance(config.vocabulary, grammar_tasks.WordVocabulary | None):
        return read_rows(task, config, kind)
    key = traced.equal((task.name, config, kind))
    if key not in toy_rows:
        toy_rows[key] = read_rows(task, config, kind)
    return toy_rows[key]


class Configured(Exception):
    """Everything has its value; the run itself is not wanted."""


def configured(*argv):
    """The operative configuration of a command line: what its run would write to config.gin."""

    texts = []

    def stop(*args):
        texts.append(configure.operative_config_text())  # the command clears gin as it ends
        raise Configured

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Configured):
        patch.setattr(Partitioner, 'scope', stop)
        result = perl(*argv)
        pytest.fail(result.err)
    return texts[0]


@contextlib.contextmanager
def settings():
    before = {name: jax.config.values[name] for name in SETTINGS}
    ours, path = logging.getLogger('perl_jax'), list(sys.path)
    state = ours.handlers, ours.propagate, ours.level, logging.getLogger('absl').level
    for name, value in SETTINGS.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it may have been found switched off
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(grammar_tasks.SIZES, 'train', 64)  # the first ones are always the same
            patch.setattr(jax, 'jit', traced.jit)
            patch.setattr(datasets, '_read_rows_in_memory', read_once)
            yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        ours.handlers, ours.propagate, level, absl = state
        ours.setLevel(level)
        logging.getLogger('absl').setLevel(absl)
        sys.path[:] = path


@contextlib.contextmanager
def watched():
    """Notes what a run starts from: its bases, as they lie on the devices and as they were, and its states."""
    seen, load, start = types.SimpleNamespace(bases=[], states=None), base.load, loop.start

    def noted_load(*args):
        loaded = load(*args)
        seen.bases.append((loaded, jax.tree.map(np.array, loaded.params)))  # a copy: device_get may give a view
        return loaded

    def noted_start(phase, config, tuning, frozen, states, **given):
        seen.states = jax.tree.map(np.array, states)
        return start(phase, config, tuning, frozen, states, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, 'load', noted_load)
        patch.setattr(loop, 'start', noted_start)
        yield seen


class Toys:
    """Runs of the toy recipes, each made when it is first asked for. To change one, copy it first."""

    def __init__(self, folder):
        self.folder, self.seen = folder, {}

    def _make(self, name, phase, *flags):
        folder = self.folder / name
        with watched() as seen:
            ran(*toy(phase, folder, *flags))
        self.seen[folder] = seen
        return folder

    @functools.cached_property
    def sft(self):
        return self._make('sft', 'sft')

    @functools.cached_property
    def sft_lora(self):
        flags = '--gin_file=tuning/lora.gin', '--gin.lora.LoraSpec.targets=%lora.ALL_LINEAR'
        return self._make('sft_lora', 'sft', *flags)

    @functools.cached_property
    def reward(self):
        return self._make('reward', 'reward', quoted('INITIAL_CHECKPOINT_PATH', self.sft))

    @functools.cached_property
    def reward_full(self):
        flags = '--gin_file=tuning/full.gin', quoted('INITIAL_CHECKPOINT_PATH', self.sft)
        return self._make('reward_full', 'reward', *flags)

    @property
    def sources(self):
        """The flags that a policy starts from."""
        return quoted('INITIAL_CHECKPOINT_PATH', self.sft), quoted('REWARD_MODEL_DIR', self.reward)

    @functools.cached_property
    def policy(self):
        return self._make('policy', 'policy', *self.sources)

    @functools.cached_property
    def policy_full(self):
        return self._make('policy_full', 'policy', *self.sources, '--gin_file=tuning/full.gin')


@functools.cache
def _toys(folder):
    return Toys(folder)


@pytest.fixture(scope='session')
def toys(tmp_path_factory):
    """One set of runs for all modules that a process tests."""
    return _toys(tmp_path_factory.getbasetemp() / 'toys')


def rows(folder, name='metrics.jsonl', timeless=True):
    """The lines of one of a run's files, without the times that no two runs share."""
    lines = (pathlib.Path(folder) / name).read_text().splitlines()
    keep = (lambda key: not key.startswith('throughput/')) if timeless else bool
    return [{key: value for key, value in json.loads(line).items() if keep(key)} for line in lines]


def steps(folder):
    """The steps of the checkpoints of a run."""
    return sorted(int(name) for name in os.listdir(pathlib.Path(folder) / 'checkpoints') if name.isdigit())


def state(folder, step=None):
    """All that a checkpoint holds, as host arrays by path; the latest unless told."""
    path = pathlib.Path(folder).absolute() / 'checkpoints' / str(step or steps(folder)[-1]) / 'state'
    shapes = ocp.PyTreeCheckpointer().metadata(path).item_metadata.tree
    kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
    tree = ocp.PyTreeCheckpointer().restore(path, restore_args=kinds)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def contents(folder):
    """Every file below a folder with its bytes: to see that nothing was touched."""
    return {path: path.read_bytes() for path in sorted(pathlib.Path(folder).rglob('*')) if path.is_file()}
