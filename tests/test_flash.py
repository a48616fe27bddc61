"""The fused kernel, its operations run one by one on this machine, against plain attention in whole networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import CONFIG, D, P, R

from perl_jax.kernels import flash
from perl_jax.models.decoder import Decoder

GEMMA = dataclasses.replace(
    CONFIG, query_scale=0.3, attention_softcap=2.0, sliding_window=P + R, global_every=2, qk_norm=True
)


@pytest.fixture
def fused(monkeypatch):
    """Every network takes the kernel, as on TPUs. Returns the calls."""
    calls, attend = [], flash.attend

    def interpreted(*args, **options):
        calls.append(args[0].shape)
        return attend(*args, **options, interpret=True)

    monkeypatch.setattr(flash, 'attend', interpreted)
    monkeypatch.setattr(flash, 'usable', lambda query, key: True)
    jax.clear_caches()  # JAX keeps what an equal network was traced to, be it by another test
    yield calls
    jax.clear_caches()  # nor is the kernel for anybody else


def sees_slowly(P, K, R, room):
    """Token by token: what branch and place of each is, and whether it may look back."""
    places = [(0, i) for i in range(P)] + [(k + 1, i) for k in range(K) for i in range(R)]
    seen = np.eye(len(places) + room, dtype=bool) & (np.arange(len(places) + room) >= len(places))[:, None]
    for q, (mine, at) in enumerate(places):
        for s, (theirs, there) in enumerate(places):
            seen[q, s] = (theirs == mine and there <= at) or (theirs == 0 and mine > 0)
    # The room behind may also look at itself further back; its rows are thrown away.
    seen[len(places) :, len(places) :] = np.tri(room, dtype=bool)
    return seen


SHAPES = [(5, 0, 0, 0), (5, 0, 0, 3), (4, 1, 3, 2), (4, 3, 2, 1), (1, 2, 1, 0)]


@pytest.mark.parametrize(('P', 'K', 'R', 'room'), SHAPES)
def test_who_sees_whom(P, K, R, room):
    np.testing.assert_array_equal(flash._visible(P, K, P + K * R, room), sees_slowly(P, K, R, room))


@pytest.mark.parametrize('config', [CONFIG, GEMMA], ids=['llama', 'gemma2'])
@pytest.mark.parametrize('K', [1, 3])
def test_a_network_and_its_gradients_are_as_without_the_kernel(config, K, fused):
    batch, network = tiny.responses(B=3, K=K), Decoder(config)
    plain = Decoder(dataclasses.replace(config, flash=False))
    params = tiny.base(plain)
    adapter = tiny.adapter(tiny.SPECS['lora'], params, head=False)
    read = np.concatenate([np.ones_like(batch.targets_mask[..., :1]), batch.targets_mask], axis=-1)[..., None]
    weights = np.random.default_rng(1).standard_normal((3, K, R + 1, D)).astype(np.float32) * read

    def run(network):
        def total(params, adapter):
            hidden = tiny.hidden(params, adapter, batch, network=network)
            return (hidden * weights).sum(), jnp.where(read, hidden, 0)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, adapter)

    (_, want), want_gradients = run(plain)
    assert not fused
    (_, got), gradients = run(network)
    assert fused and set(fused) == {(3, P + K * R, 4, 6)}
    np.testing.assert_allclose(got, want, atol=1e-5)
    tiny.assert_close(gradients, want_gradients, atol=2e-4, rtol=1e-4)


def test_prompts_alone(fused):
    plain = Decoder(dataclasses.replace(CONFIG, flash=False))
    batch, params = tiny.responses(B=3, K=2), tiny.base(plain)
    read = batch.inputs, batch.inputs_mask
    prefill = lambda network: network.apply({'params': params}, *read, 2, R, method='prefill')  # noqa: E731
    want, cache = prefill(plain)
    assert not fused
    got, mine = prefill(Decoder(CONFIG))
    assert fused
    np.testing.assert_allclose(got, want, atol=1e-5)
    real = batch.inputs_mask[None, :, None, :, None]
    for one, other in zip(mine.prompt, cache.prompt):
        np.testing.assert_allclose(np.where(real, one, 0), np.where(real, other, 0), atol=1e-5)


def test_a_window_that_somebody_outgrows_takes_the_plain_path(fused):
    batch, config = tiny.responses(B=3, K=2), dataclasses.replace(GEMMA, sliding_window=P + R - 1)
    params = tiny.base(Decoder(dataclasses.replace(config, flash=False)))
    tiny.hidden(params, None, batch, network=Decoder(config))
    assert not fused


def test_a_run_of_several_blocks(fused):
    """700 tokens: room up to 768, two blocks of 384, the upper of which is skipped; padding in the middle."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 700, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    mask = np.arange(500) < np.array([[500], [77]])
    got = flash.attend(query, key, value, mask, 2)
    seen = flash._visible(500, 2, 700, 0)[None] & np.pad(mask, ((0, 0), (0, 200)), constant_values=True)[:, None]
    scores = np.einsum('btngd,bsnd->bngts', query.reshape(2, 700, 2, 2, 8), key) * 8**-0.5
    weights = jax.nn.softmax(np.where(seen[:, None, None], scores, -np.inf), axis=-1)
    want = np.einsum('bngts,bsnd->btngd', weights, value).reshape(2, 700, 32)
    real = np.pad(mask, ((0, 0), (0, 200)), constant_values=True)
    np.testing.assert_allclose(got[real], want[real], atol=1e-5)


def test_off_tpus_nobody_takes_the_kernel():
    x = np.zeros((2, 3, 4, 8), np.float32)
    assert not flash.usable(x, x)
