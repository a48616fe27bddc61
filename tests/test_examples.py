"""The examples run as a stranger runs them, on a tiny model of Hugging Face's form, and learn what they say."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tiny

from perl_jax.interop import hf, peft
from perl_jax.models.decoder import Decoder, DecoderConfig
from perl_jax.parallel import partitioning

EXAMPLES = pathlib.Path(__file__).parents[1] / 'examples'


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as transformers writes it: two layers, and a tokenizer of bytes."""
    tokenizers = pytest.importorskip('tokenizers')
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(['<pad>', '<eos>', *alphabet])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(['<pad>', '<eos>'])
    network = Decoder(
        DecoderConfig(
            vocab_size=len(vocab), num_layers=2, emb_dim=32, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48
        )
    )
    folder = tmp_path / 'model'
    hf.save(folder, network, tiny.base(network), 'float32')
    tokenizer.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '<eos>', 'pad_token': '<pad>'}))
    return folder


def test_rl_in_40_lines(checkpoint, tmp_path):
    """A folder in, an adapter for peft out, and in between more of what the Python function rewards."""
    rewards = example('rl_in_40_lines').main(str(checkpoint), str(tmp_path / 'out'), steps=16)
    assert np.mean(rewards[-3:]) > 2 * np.mean(rewards[:3])
    network = hf.network(str(checkpoint))
    adapter = peft.load(tmp_path / 'out', network, partitioning.abstract_params(network)[0])
    assert np.abs(adapter.lora['decoder']['layers']['self_attention']['query']['b']).max() > 0
    assert peft.base_of(tmp_path / 'out') == str(checkpoint)


def test_own_algorithm():
    rewards = example('own_algorithm').main(num_steps=8)
    assert np.mean(rewards[-2:]) > 2 * np.mean(rewards[:2])
