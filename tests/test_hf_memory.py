"""Reading a checkpoint takes little more memory than it does itself."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from perl_jax.interop import hf
from perl_jax.parallel import partitioning

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    'model_type': 'llama', 'vocab_size': 500, 'num_hidden_layers': 2, 'hidden_size': 64, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'intermediate_size': 96, 'tie_word_embeddings': True,
}  # fmt: skip
# Large beside what an allocator keeps back, about 15 MB.
LARGE = SMALL | {'vocab_size': 30_000, 'num_hidden_layers': 8, 'hidden_size': 1024, 'intermediate_size': 3072}
CODE = """
import re, sys
from perl_jax.runs import base
from perl_jax.interop import hf
from perl_jax.parallel.partitioning import Partitioner

kept = []
for folder in sys.argv[1:3]:  # the small one first: what is loaded and compiled once does not count
    with Partitioner().scope():
        kept.append(base.load(base.BaseConfig(hf.network(folder), folder, sys.argv[3]), Partitioner(), 0))
    print(int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024)
"""


def write(folder, config, dtype):
    """A checkpoint of zeros, which take no memory before they are written."""
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    network = hf.network(str(folder))
    shapes, _ = partitioning.abstract_params(network)
    hf.save(folder, network, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), dtype)
    return (folder / 'model.safetensors').stat().st_size


@pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='reads the peak where Linux keeps it')
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_peak_stays_below_1_3_times_the_checkpoint(dtype, tmp_path):
    write(tmp_path / 'small', SMALL, dtype)
    size = write(tmp_path / 'large', LARGE, dtype)
    command = [sys.executable, '-c', CODE, str(tmp_path / 'small'), str(tmp_path / 'large'), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    before, peak = map(int, out.split())
    assert size > 150e6
    assert size < peak - before < 1.3 * size
