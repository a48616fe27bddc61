"""Reading a checkpoint takes little more memory than it does itself."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {
    'model_type': 'llama', 'vocab_size': 16000, 'num_hidden_layers': 8, 'hidden_size': 1024, 'num_attention_heads': 8,
    'num_key_value_heads': 4, 'intermediate_size': 3072, 'tie_word_embeddings': True, 'rope_theta': 1e4,
}  # fmt: skip
CODE = """
import resource, sys
import jax, jax.numpy as jnp
from perl_jax import base
from perl_jax.interop import hf
from perl_jax.partitioning import Partitioner

network = hf.network(sys.argv[1])
with Partitioner().scope():
    base.load(base.BaseConfig(network, sys.argv[2]), Partitioner(), 0)  # a small one: what is loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = base.load(base.BaseConfig(network, sys.argv[1], sys.argv[3]), Partitioner(), 0)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
