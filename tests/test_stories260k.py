"""A real, trained model through the real decoder: its greedy text is known."""

import golden_llama
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import stories260k

from perl_jax.models.decoder import Decoder

pytestmark = stories260k.needs_stories
OPENING = 'Once upon a time, there was a little girl named Lily. She loved to play outside in the park.'
LENGTH = 48


@pytest.fixture(scope='module')
def model():
    config, params = stories260k.load()
    return Decoder(config), params


def text(ids):
    pieces = stories260k.pieces()
    return b''.join(pieces[i] for i in ids).decode().strip()


def test_parameters_are_all_read(model):
    assert sum(x.size for x in jax.tree.leaves(model[1])) == 260_032


def test_greedy_text_by_full_passes(model):
    net, params = model

    @jax.jit
    def best(targets):
        prompt = jnp.full((1, 1), stories260k.BOS)
        hidden = net.apply({'params': params}, prompt, prompt > 0, targets)
        return net.apply({'params': params}, hidden, method='logits').argmax(-1)[0, 0]

    ids = np.zeros((1, 1, LENGTH), int)
    for t in range(LENGTH):  # what stands at t and later cannot be seen from there
        ids[0, 0, t] = best(ids)[t]
    assert text(ids[0, 0]).startswith(OPENING)


def test_greedy_text_by_the_cache(model):
    net, params = model
    variables = {'params': params}
    prompt = jnp.full((1, 1), stories260k.BOS)
    hidden, cache = net.apply(variables, prompt, prompt > 0, 1, LENGTH, method='prefill')

    @jax.jit
    def step(token, t, cache):
        hidden, cache = net.apply(variables, token[None, None], t, cache, method='decode')
        return net.apply(variables, hidden, method='logits').argmax(-1)[0, 0], cache

    ids = [net.apply(variables, hidden, method='logits').argmax(-1)[0]]
    for t in range(LENGTH - 1):
        token, cache = step(ids[-1], t, cache)
        ids.append(token)
    assert text(ids).startswith(OPENING)


def test_logits_equal_an_obvious_llama(model):
    net, params = model
    tokens = np.random.default_rng(0).integers(3, 512, 24)
    hidden = net.apply({'params': params}, tokens[None, :9], np.ones((1, 9), bool), tokens[None, None, 9:])
    got = net.apply({'params': params}, hidden, method='logits')[0, 0]
    np.testing.assert_allclose(got, golden_llama.logits(params, net.config, tokens)[8:], atol=2e-4)
