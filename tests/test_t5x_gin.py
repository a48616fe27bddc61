"""A T5X model file as the base of a run, by a stand-in with the names of T5X, which is not installed."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import re
import sys
import types

import jax.numpy as jnp
import pytest
from toy_runs import perl, ran, toy

from perl_jax.errors import UserError
from perl_jax.interop import t5x
from perl_jax.networks.t5 import T5, T5Config

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


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """T5X, as far as its model files go."""
    folder = tmp_path / 'site/t5x/examples/t5'
    (folder / 't5_1_1').mkdir(parents=True)
    for name in '.', '..', '../..':
        (folder / name / '__init__.py').touch()
    (folder / 'network.py').write_text(NETWORK)
    (folder / 't5_1_1/base.gin').write_text(BASE)
    (folder / 't5_1_1/tiny.gin').write_text(TINY)
    for name in [name for name in sys.modules if name.partition('.')[0] == 't5x']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path / 'site')
    yield
    for name in [name for name in sys.modules if name.partition('.')[0] == 't5x']:
        sys.modules.pop(name)


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
