"""What a process holds while it loads its part of a model: that part, two of its largest shards, and little more."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from toy_runs import ENVIRONMENT

from perl_jax.interop import gguf, hf, t5x
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel import partitioning
from perl_jax.runs.fingerprints import fingerprint

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
ROOM = 300e6
LLAMA = {
    'model_type': 'llama', 'vocab_size': 32_000, 'num_hidden_layers': 4, 'hidden_size': 1024, 'num_attention_heads': 8,
    'num_key_value_heads': 4, 'intermediate_size': 4096, 'tie_word_embeddings': True,
}  # fmt: skip
ENCODER_DECODER = T5Config(
    vocab_size=32_000, emb_dim=1024, num_heads=8, head_dim=128, mlp_dim=4096, num_encoder_layers=2,
    num_decoder_layers=2, logits_via_embedding=True, activation='gelu', gated=True,
)  # fmt: skip
CODE = """
import json, re, sys, threading, time
import jax
from perl_jax.runs import base
from perl_jax.parallel import partitioning
from perl_jax.interop import gguf, hf
from perl_jax.models.t5 import T5, T5Config

small, path, config, address, count, index = *sys.argv[1:5], *map(int, sys.argv[5:])
if count > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    jax.distributed.initialize(address, count, index)
from perl_jax.models.decoder import Decoder

def anonymous():
    return int(re.search(r'RssAnon:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024

def load(path, config=None):
    network = T5(T5Config(**json.loads(config))) if config else (
        Decoder(gguf.config(path)) if path.endswith('.gguf') else hf.network(path))
    return base.load(base.BaseConfig(network, path), on, 0)

rules = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
on = partitioning.Partitioner(2 if count == 4 else 1, logical_axis_rules=rules)
with on.scope():
    load(small)  # what is imported and compiled once does not count
    before = peak = anonymous()
    done = threading.Event()

    def watch():
        global peak
        while not done.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    loaded = load(path, config)
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
shards = [shard.data.nbytes for x in jax.tree.leaves(loaded.params) for shard in x.addressable_shards]
print(json.dumps({'peak': peak - before, 'share': sum(shards), 'largest': max(shards), 'seconds': seconds,
                  'fingerprint': loaded.fingerprint}))
"""
linux = pytest.mark.skipif(not pathlib.Path('/proc/self/status').exists(), reason='reads what Linux counts')


def random(network):
    """Parameters on the host, no two rows alike, and their fingerprint."""
    rng, (shapes, _) = np.random.default_rng(0), partitioning.abstract_params(network)
    params = jax.tree.map(lambda x: rng.random(x.shape, np.float32), shapes)
    return params, fingerprint(params)


def folder(path, config):
    path.mkdir()
    (path / 'config.json').write_text(json.dumps(config))
    network = hf.network(str(path))
    params, name = random(network)
    hf.save(path, network, params, 'float32')
    return str(path), name


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    tiny = {'vocab_size': 512, 'num_hidden_layers': 2, 'hidden_size': 64, 'intermediate_size': 96}
    return folder(tmp_path_factory.mktemp('small') / 'hf', LLAMA | tiny)[0]


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    return folder(tmp_path_factory.mktemp('large') / 'hf', LLAMA)


def loaded(count, small, path, config=''):
    """What each of so many processes says of its loading."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        address = f'localhost:{free.getsockname()[1]}'
    env = os.environ | ENVIRONMENT | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': ''}
    command = [sys.executable, '-c', CODE, small, path, config, address, str(count)]
    processes = [
        subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def check(each, size, name):
    print(each)
    for one in each:
        assert one['fingerprint'] == name
        assert one['share'] < 1.02 * size / len(each)  # norms lie on all
        assert one['peak'] < one['share'] + 2 * one['largest'] + ROOM


@linux
@pytest.mark.parametrize('count', [1, 2, 4])
def test_of_safetensors(count, small, large):
    path, name = large
    check(loaded(count, small, path), pathlib.Path(path, 'model.safetensors').stat().st_size, name)


@linux
def test_of_t5x(small, tmp_path):
    network = T5(ENCODER_DECODER)
    params, name = random(network)
    t5x.save(str(tmp_path), jax.tree.map(jax.numpy.asarray, params), 1)
    config = {key: getattr(ENCODER_DECODER, key) for key in ENCODER_DECODER.__dataclass_fields__}
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    check(loaded(2, small, str(tmp_path), json.dumps(config)), size, name)


@linux
def test_of_gguf(small, tmp_path):
    tiny_gguf = pytest.importorskip('tiny_gguf', exc_type=ImportError)
    config = hf.network(small).config
    sizes = {'vocab_size': 32_000, 'num_layers': 4, 'emb_dim': 1024, 'num_heads': 8, 'num_kv_heads': 4}
    config = type(config)(**sizes, head_dim=128, mlp_dim=4096)
    path = tmp_path / 'large.gguf'
    kind = tiny_gguf.gguf.GGMLQuantizationType.Q8_0
    tiny_gguf.write(path, tiny_gguf.random_tensors(config), config, quantize=kind)
    params = gguf.load(path)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    check(loaded(2, small, str(path)), size, fingerprint(params))
