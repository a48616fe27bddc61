"""A T5X model file as the base of a run, by a stand-in with the names of T5X, which is not installed."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import re
import sys
import types

import jax.numpy as jnp
import pytest
from test_recipes import ROOT
from toy_runs import Configured, configured, perl, quoted, ran, toy

from perl_jax.cli import configure, t5x_names
from perl_jax.errors import UserError
from perl_jax.interop import t5x
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel.partitioning import Partitioner

NETWORK = '''
import dataclasses
from typing import Any, Sequence

import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class T5Config:
    vocab_size: int
    dtype: Any = jnp.float32
    emb_dim: int = 512
    num_heads: int = 8
    num_encoder_layers: int = 6
    num_decoder_layers: int = 6
    head_dim: int = 64
    mlp_dim: int = 2048
    mlp_activations: Sequence[str] = ('relu',)
    dropout_rate: float = 0.1
    logits_via_embedding: bool = False


class Transformer:
    def __init__(self, config):
        self.config = config
'''
BASE = '''
from __gin__ import dynamic_registration
from t5x.examples.t5 import network
DROPOUT_RATE = %gin.REQUIRED
OPTIMIZER = 'of T5X'
network.Transformer.config = @network.T5Config()
network.T5Config:
  vocab_size = 128
  dtype = 'bfloat16'
  emb_dim = 768
  mlp_activations = ('gelu', 'linear')
  dropout_rate = %DROPOUT_RATE
'''
TINY = '''
include 't5x/examples/t5/t5_1_1/base.gin'
network.T5Config:
  emb_dim = 8
  num_heads = 4
  num_encoder_layers = 1
  num_decoder_layers = 2
  head_dim = 3
  mlp_dim = 16
'''


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """T5X, as far as its model files go; once, since gin knows a class for good."""
    site = tmp_path_factory.mktemp('site')
    folder = site / 't5x/examples/t5'
    (folder / 't5_1_1').mkdir(parents=True)
    for name in '.', '..', '../..':
        (folder / name / '__init__.py').touch()
    (folder / 'network.py').write_text(NETWORK)
    (folder / 't5_1_1/base.gin').write_text(BASE)
    (folder / 't5_1_1/tiny.gin').write_text(TINY)
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition('.')[0] == 't5x'}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield
    for name in [name for name in sys.modules if name.partition('.')[0] == 't5x']:
        sys.modules.pop(name)
    sys.modules.update(before)


def test_a_run_on_it_can_be_asked(installed, tmp_path):
    phase, recipe, *rest = toy('sft', tmp_path / 'run')
    files = '--gin_file=t5x/examples/t5/t5_1_1/tiny.gin', recipe, '--gin_file=models/from_t5x.gin'
    ran(phase, *files, *rest, '--gin.TRAIN_STEPS=2')
    config = (tmp_path / 'run/config.gin').read_text()
    assert re.search(r'^[\w.]*network.module = @network.Transformer\(\)', config, re.M)
    assert "'of T5X'" not in config  # the recipe came later
    assert ran('sample', f'--model_dir={tmp_path}/run', '--num=2').out.count('"truth"') == 2
    assert perl('export', f'--model_dir={tmp_path}/run', '--format=t5x', f'--output={tmp_path}/out').code == 0
    tree = t5x.load(str(tmp_path / 'out'))
    assert tree['encoder']['layers']['attention']['query']['kernel'].shape == (1, 8, 12)
    assert tree['token_embedder']['embedding'].shape == (128, 8)


MODEL, FROM_T5X = '--gin_file=t5x/examples/t5/t5_1_1/tiny.gin', '--gin_file=models/from_t5x.gin'


@pytest.mark.parametrize(
    ('setting', 'words'),
    [
        ('--gin.DROPOUT_RATE=0.1', ['DROPOUT_RATE = 0.1', 'without', '--gin.DROPOUT_RATE=0.0']),
        ('--gin.network.T5Config.dropout_rate=0.1', ['network.T5Config.dropout_rate = 0.1', 'lora.LoraSpec.dropout']),
        ('--gin.Z_LOSS=0.01', ['Z_LOSS = 0.01', 'no z-loss', '--gin.Z_LOSS=0.0', 'docs/reference/t5x.md']),
        ('--gin.LABEL_SMOOTHING=0.1', ['LABEL_SMOOTHING = 0.1', 'no label smoothing']),
        ('--gin.LOSS_NORMALIZING_FACTOR=233472', ['LOSS_NORMALIZING_FACTOR = 233472', 'means over the real tokens']),
        ('--gin.USE_HARDWARE_RNG=True', ['USE_HARDWARE_RNG of T5X', 'RANDOM_SEED', 'docs/reference/t5x.md']),
        ('--gin.MODEL=@network.Transformer()', ['MODEL of T5X is not read here: use NETWORK']),
        ('--gin.utils.SaveCheckpointConfig.period=3', ['utils.SaveCheckpointConfig', 'docs/reference/t5x.md']),
        ('--run_mode=train', ["unknown argument '--run_mode=train'", 'docs/reference/t5x.md']),
        ('--gin.OPTIMIZER=%MINE', ['OPTIMIZER is builtins.str', 'before the recipe']),
    ],
)
def test_what_of_t5x_would_change_nothing_is_named(setting, words, installed, tmp_path):
    (tmp_path / 'mine.gin').write_text(
        "include 't5x/examples/t5/t5_1_1/tiny.gin'\nZ_LOSS = 0.0001\nLABEL_SMOOTHING = 0.0\n"
        "LOSS_NORMALIZING_FACTOR = None\nMINE = 'of T5X'\n"
    )
    phase, recipe, *rest = toy('sft', tmp_path / 'run')
    line = perl(phase, f'--gin_file={tmp_path}/mine.gin', recipe, FROM_T5X, *rest, setting).line
    assert all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('text', ['DROPOUT_RATE = 0.1', 'LABEL_SMOOTHING = 0.1', 'LOSS_NORMALIZING_FACTOR = 131077'])
def test_nor_may_a_file_set_it(text, installed, tmp_path):
    (tmp_path / 'mine.gin').write_text(f"include 't5x/examples/t5/t5_1_1/tiny.gin'\n{text}\n")
    phase, recipe, *rest = toy('sft', tmp_path / 'run')
    argv = phase, f'--gin_file={tmp_path}/mine.gin', recipe, FROM_T5X, *rest
    name, off = text.split()[0], 'None' if 'LOSS' in text else '0.0'
    assert f'{text} of T5X would change nothing' in perl(*argv).line
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Configured):  # off, as the line says
        patch.setattr(Partitioner, 'scope', stopped)
        perl(*argv, f'--gin.{name}={off}')


WHAT_TO_DO = {  # a macro of T5X, and what its line says of ours
    'MIXTURE_OR_TASK_MODULE': "--gin_bindings='import MODULE'", 'MODEL': 'use NETWORK',
    'DROPOUT_RATE': 'lora.LoraSpec.dropout', 'Z_LOSS': 'no z-loss', 'LABEL_SMOOTHING': 'no label smoothing',
    'LOSS_NORMALIZING_FACTOR': 'means over the real tokens', 'EVAL_STEPS': 'use EVAL_EXAMPLES',
    'EVALUATOR_NUM_EXAMPLES': 'use EVAL_EXAMPLES', 'EVALUATOR_USE_MEMORY_CACHE': 'leave it out',
    'JSON_WRITE_N_RESULTS': 'samples.jsonl', 'INFER_EVAL_DATASET': 'use PROMPTS_DATASET',
    'SHUFFLE_TRAIN_EXAMPLES': 'always shuffled', 'USE_HARDWARE_RNG': 'RANDOM_SEED',
    'ACTIVATION_DTYPE': 't5.T5Config.dtype', 'ACTIVATION_PARTITIONING_DIMS': 'Partitioner.logical_axis_rules',
    'PARAMETER_PARTITIONING_DIMS': 'Partitioner.logical_axis_rules',
    'MODEL_PARALLEL_SUBMESH': 'Partitioner.num_partitions', 'NUM_MODEL_PARTITIONS': 'Partitioner.num_partitions',
    'CHECKPOINT_PERIOD': 'use EVAL_PERIOD', 'SAVING_PERIOD': 'use EVAL_PERIOD', 'CHECKPOINT_PATH': '--model_dir',
    'INFER_OUTPUT_DIR': '--model_dir', 'EVAL_OUTPUT_DIR': '--model_dir', 'TRAIN_STEPS_RELATIVE': 'use TRAIN_STEPS',
}  # fmt: skip
TAKEN = {
    'TRAIN_STEPS': 7, 'BATCH_SIZE': 8, 'OPTIMIZER': '@optax.adam()', 'USE_CACHED_TASKS': True, 'EVAL_PERIOD': 3,
    'RANDOM_SEED': 5, 'MIXTURE_OR_TASK_NAME': 'toy_sft', 'TASK_FEATURE_LENGTHS': {'inputs': 9, 'targets': 9},
    'MODEL_DIR': 'other', 'INITIAL_CHECKPOINT_PATH': 'x', 'VOCABULARY': 'y',
    'PARTITIONER': '@partitioning.Partitioner()',
}  # fmt: skip


def test_each_macro_of_t5x_is_taken_or_refused_with_ours():
    page = (ROOT / 'docs/reference/t5x.md').read_text()
    assert {*t5x_names.OURS, *t5x_names.MACROS} == set(WHAT_TO_DO)
    assert not [name for name in (*WHAT_TO_DO, *TAKEN) if name not in page]


@pytest.mark.parametrize('name', sorted(WHAT_TO_DO))
def test_a_macro_that_is_t5xs_alone_is_refused_with_ours(name, tmp_path):
    (tmp_path / 'mine.gin').write_text(f"include 'recipes/toy_sft.gin'\n{name} = 3\n")
    for argv in (toy('sft', 'z', f'--gin.{name}=3'), ['sft', f'--gin_file={tmp_path}/mine.gin', *toy('sft', 'z')[2:]]):
        line = perl(*argv).line
        assert name in line and WHAT_TO_DO[name] in line and 'docs/reference/t5x.md' in line
        assert 'nearest' not in line


@pytest.mark.parametrize('name', sorted(TAKEN))
def test_a_macro_of_both_is_taken(name):
    value = TAKEN[name]
    text = repr(value) if not str(value).startswith('@') else value
    needs = ['--gin.optax.adam.learning_rate=1e-3'] if 'optax.adam' in text else []
    argv = toy('sft', 'z', *needs, f'--gin.{name}={text}')
    assert configure.settings(configured(*argv))[name] == value


@pytest.mark.parametrize(
    ('flag', 'remedy'),
    [
        ('--gin.utils.SaveCheckpointConfig.period=3', t5x_names.PAGE),
        ('--gin.PARTITIONER=@partitioning.PjitPartitioner()', t5x_names.PAGE),
        ('--dry_run', t5x_names.PAGE),
        ('--gin.ALGORITHM=@raft.Raft()', 'import its module in a gin file'),
        ('--gin.partitioning.Partitionr.num_partitions=2', 'import its module in a gin file'),
        ('--gin.ENTROPY_BONS=0.1', 'nearest:'),
        ('--dry_runs', 'perl_jax sft --help'),
    ],
)
def test_the_page_of_t5xs_names_is_given_for_those_alone(flag, remedy):
    line = perl(*toy('sft', 'z', flag)).line
    assert remedy in line and (t5x_names.PAGE in line) == (remedy == t5x_names.PAGE)


def test_only_what_is_near_is_suggested():
    for name, near in ('BATCHSIZE', 'BATCH_SIZE'), ('LORA_LEARNING_RTE', 'LORA_LEARNING_RATE'), ('LR', 'none'):
        line = perl(*toy('sft', 'z', f'--gin.{name}=3')).line
        assert f"nothing reads a macro called '{name}'; nearest: {near}" in line
    for name in 'NUM_STEPS', 'DTYPE', 'KL_COEFFICIENT':
        assert 'nearest: none' in perl(*toy('sft', 'z', f'--gin.{name}=3')).line


def test_a_macro_of_a_file_that_nothing_reads(tmp_path):
    """What looks misspelt ends the command; another is told of; what some of the package's files read is let pass."""
    file = tmp_path / 'mine.gin'
    argv = ['sft', '--gin_file=recipes/toy_sft.gin', f'--gin_file={file}', *toy('sft', 'z')[2:]]
    for name, near in ('LEARNIG_RATE', 'LEARNING_RATE'), ('EVAL_PERIODS', 'EVAL_PERIOD'):
        file.write_text(f'{name} = 3\n')
        assert f"nothing reads a macro called '{name}'; nearest: {near}" in perl(*argv).line
    file.write_text('MY_WIDTH = 3\nKL_TARGET = 6.0\nMY_RATE = 0.01\nLEARNING_RATE = %MY_RATE\n')
    warnings = perl(*argv, '--gin.TRAIN_STEPS=-1').err.splitlines()[:-1]  # the last line is the error
    assert warnings == ["perl_jax: gin: nothing reads the macro 'MY_WIDTH', which a file sets"]


def stopped(*args):
    raise Configured


def test_a_model_file_after_the_recipe_is_told_where_it_belongs(installed, tmp_path):
    for phase in ('sft', 'reward', 'policy'):
        _, recipe, *rest = toy(phase, tmp_path / 'run')
        rest += [quoted('INITIAL_CHECKPOINT_PATH', 'x'), quoted('REWARD_MODEL_DIR', 'y')][: 1 + (phase == 'policy')]
        line = perl(phase, recipe, MODEL, FROM_T5X, *rest).line
        assert 'OPTIMIZER is builtins.str, no optimizer of optax: a T5X model file' in line
        assert not (tmp_path / 'run').exists()


def test_the_z_loss_of_every_file_of_t5x_is_no_ones_choice(installed, tmp_path):
    (tmp_path / 'mine.gin').write_text("include 't5x/examples/t5/t5_1_1/tiny.gin'\nZ_LOSS = 0.0001\n")
    phase, recipe, *rest = toy('sft', tmp_path / 'run')
    argv = f'--gin_file={tmp_path}/mine.gin', recipe, FROM_T5X, *rest, '--gin.TRAIN_STEPS=1'
    ran(phase, *argv, '--gin.PROMPTS_DATASET=None')


def test_other_networks_of_t5x_are_named():
    with pytest.raises(UserError, match=r'not the network of t5x.examples.t5 \(remat_policy, scan_layers differ\)'):
        t5x.network(config(scan_layers=True, remat_policy='none'))
    bare = types.SimpleNamespace(config=types.SimpleNamespace(vocab_size=8))
    with pytest.raises(UserError, match='decoder_only and scalable_t5 are not read'):
        t5x.network(bare)


def config(**changes):
    sizes = {
        'vocab_size': 60, 'emb_dim': 8, 'num_heads': 2, 'head_dim': 3, 'mlp_dim': 16, 'num_encoder_layers': 1,
        'num_decoder_layers': 2, 'logits_via_embedding': True, 'dtype': jnp.bfloat16, 'mlp_activations': ('relu',),
    }  # fmt: skip
    return types.SimpleNamespace(config=types.SimpleNamespace(**sizes | changes))


def test_every_size_is_taken_over():
    assert t5x.network(config()) == T5(
        T5Config(
            vocab_size=60, emb_dim=8, num_heads=2, head_dim=3, mlp_dim=16, num_encoder_layers=1, num_decoder_layers=2,
            activation='relu', gated=False, logits_via_embedding=True, dtype='bfloat16',
        )
    )  # fmt: skip
    gated = t5x.network(config(mlp_activations=['gelu', 'linear'], dtype='float32')).config
    assert (gated.activation, gated.gated, gated.dtype) == ('gelu', True, 'float32')


def test_activations_that_are_not_there_are_named():
    with pytest.raises(UserError, match=r"mlp_activations = \('swish', 'linear'\)"):
        t5x.network(config(mlp_activations=('swish', 'linear')))
