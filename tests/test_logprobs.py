import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import NETWORK, UNTIED, D, R, V

from perl_jax.models import logprobs, lora

B, K = 3, 2
BATCH = tiny.responses(B, K)
HIDDEN = jnp.asarray(np.random.default_rng(0).standard_normal((B, K, R, D)), jnp.float32)
# One position at a time, and two, which does not divide R = 5; the last is one chunk of all.
CHUNKS = [1, B * K * V, 2 * B * K * V, 2**24]


def token_logprobs(hidden=HIDDEN, network=NETWORK, temperature=1.0):
    variables = {'params': tiny.base(network)}
    run = jax.jit(lambda v, h: logprobs.token_logprobs(network, v, h, BATCH, temperature))
    return run(variables, hidden)


def want(hidden=HIDDEN, temperature=1.0):
    logits = np.float64(hidden) @ np.float64(tiny.base()['token_embedder']['embedding']).T / temperature
    whole = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(whole, BATCH.targets[..., None], -1)[..., 0]


@pytest.mark.parametrize('temperature', [1.0, 0.7, 3.0])
@pytest.mark.parametrize('most', CHUNKS)
def test_log_softmax_at_the_targets(monkeypatch, most, temperature):
    monkeypatch.setattr(logprobs, 'MAX_LOGITS', most)
    got = token_logprobs(temperature=temperature)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want(temperature=temperature), atol=1e-5)


@pytest.mark.parametrize('network', [NETWORK, UNTIED], ids=['tied', 'untied'])
def test_chunks_equal_the_whole_values_and_gradients(monkeypatch, network):
    def run(most):
        monkeypatch.setattr(logprobs, 'MAX_LOGITS', most)

        def loss(params, hidden):
            got = logprobs.token_logprobs(network, {'params': params}, hidden, BATCH)
            return (got * HIDDEN[..., 0]).sum(), got

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(tiny.base(network), HIDDEN)

    ((_, chunked), gradients), ((_, whole), whole_gradients) = run(2 * B * K * V), run(2**24)
    np.testing.assert_allclose(chunked, whole, atol=1e-6)
    output = 'decoder' if network is UNTIED else 'token_embedder'
    assert any(np.abs(x).max() > 0.1 for x in jax.tree.leaves(whole_gradients[0][output]))
    assert np.abs(whole_gradients[1]).max() > 0.1
    tiny.assert_close(gradients, whole_gradients, atol=1e-5)


@pytest.mark.parametrize('network', [NETWORK, UNTIED], ids=['tied', 'untied'])
def test_gradients_are_those_of_plain_autodiff(monkeypatch, network):
    """To states and output layer, with weights that differ from token to token, some 0, at a temperature."""
    monkeypatch.setattr(logprobs, 'MAX_LOGITS', 2 * B * K * V)
    weights = HIDDEN[..., 0] * (HIDDEN[..., 1] > 0)

    def plain(variables, hidden):
        logps = jax.nn.log_softmax(network.apply(variables, hidden, method='logits') / 0.7)
        return (jnp.take_along_axis(logps, BATCH.targets[..., None], -1)[..., 0] * weights).sum()

    def ours(variables, hidden):
        return (logprobs.token_logprobs(network, variables, hidden, BATCH, 0.7) * weights).sum()

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1)))({'params': tiny.base(network)}, HIDDEN) for f in (ours, plain))
    tiny.assert_close(got, want, atol=1e-5)


def test_a_frozen_output_layer_makes_its_logits_once():
    """Two products of states and output layer: there for the logits, back for the gradient."""

    def products(argnums):
        loss = lambda v, h: logprobs.token_logprobs(NETWORK, v, h, BATCH).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums)).lower({'params': tiny.base()}, HIDDEN).compile()
        return compiled.as_text().count(' dot(')

    assert products(1) == 2
    assert products((0, 1)) == 3  # and the layer's own gradient; of a single chunk XLA finds the logits again


def largest(most, monkeypatch, gradient):
    """The most positions whose logits are held at once."""
    monkeypatch.setattr(logprobs, 'MAX_LOGITS', most)

    def loss(hidden):
        variables = {'params': tiny.base()}
        return logprobs.token_logprobs(NETWORK, variables, hidden, BATCH).sum()

    shapes = tiny.arrays(jax.grad(loss) if gradient else loss, HIDDEN)
    return max(np.prod(shape[:-1]) for shape in shapes if shape and shape[-1] == V and shape != (D, V))


@pytest.mark.parametrize('gradient', [False, True], ids=['forward', 'backward'])
def test_no_more_logits_are_held_than_allowed(monkeypatch, gradient):
    assert largest(2 * B * K * V, monkeypatch, gradient) == 2 * B * K
    assert largest(1, monkeypatch, gradient) == B * K  # one position is the least
    assert largest(2**24, monkeypatch, gradient) == B * K * R  # so the measure does see them


def test_each_token_is_predicted_by_the_state_before_it():
    """The log-prob of a response, summed, is that of its tokens one after the other in a plain sequence."""
    params, adapter = tiny.base(), tiny.adapter(tiny.SPECS['lora'], tiny.base(), head=False)
    run = jax.jit(lambda b, a: logprobs.response_logprobs(NETWORK, lora.bind(b, a), BATCH, 0.7))
    got = run(params, adapter)
    hidden = np.asarray(tiny.hidden(params, adapter, BATCH))
    np.testing.assert_allclose(got, want(hidden[:, :, :-1], 0.7), atol=1e-5)
    assert np.abs(got - want(hidden[:, :, 1:], 0.7)).max() > 1
