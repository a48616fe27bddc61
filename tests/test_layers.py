import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from perl_jax.models import layers
from perl_jax.models.attention import relative_bias, rotary, segmented

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# Dense and its hook.

X, KERNEL, A, B = normal(2, 5, 6), normal(6, 4), normal(6, 3), normal(3, 4)
DENSE = layers.Dense(4, ('embed', 'mlp'))


def dense(x, rngs=None, **lora):
    variables = {'params': {'kernel': KERNEL}} | ({'lora': lora} if lora else {})
    return DENSE.apply(variables, jnp.asarray(x), rngs=rngs)


def test_dense_without_a_pair_is_a_matmul():
    np.testing.assert_allclose(dense(X), X @ KERNEL, rtol=1e-5, atol=1e-5)


def test_dense_adds_its_pair():
    np.testing.assert_allclose(dense(X, a=A, b=B), X @ (KERNEL + A @ B), rtol=1e-5, atol=1e-5)


def test_a_pairs_gradients_are_those_of_plain_autodiff():
    weights = normal(2, 5, 4)

    def ours(x, a, b):
        return (dense(x, a=a, b=b) * weights).sum()

    def plain(x, a, b):
        return ((x @ KERNEL + x @ a @ b) * weights).sum()

    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(X, A, B) for f in (ours, plain))
    tiny.assert_close(got, want, rtol=1e-5, atol=1e-5)
    pairs = np.stack([A, 2 * A]), np.stack([B, -B])  # an ensemble's
    got, want = (jax.vmap(jax.grad(f, argnums=(0, 1, 2)), (None, 0, 0))(X, *pairs) for f in (ours, plain))
    tiny.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_dense_computes_in_its_dtype():
    low = layers.Dense(4, ('embed', 'mlp'), jnp.bfloat16)
    got = low.apply({'params': {'kernel': KERNEL}, 'lora': {'a': A, 'b': B}}, jnp.array(X))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), X @ (KERNEL + A @ B), atol=0.2)


def test_dropout_is_of_the_pairs_input_alone():
    """Each x that reaches A is either 0 or grown by 1 / keep, so that the mean stays; x W is whole."""
    x = np.ones((20000, 6), np.float32)
    rngs = {'dropout': jax.random.key(0)}
    pair = dense(x, rngs, a=np.eye(6, 3, dtype=np.float32), b=np.eye(3, 4, dtype=np.float32), dropout=jnp.float32(0.25))
    pair = pair - x @ KERNEL
    values = np.unique(np.round(pair[:, :3], 4))
    np.testing.assert_allclose(values, [0, 1 / 0.75], atol=1e-3)
    assert np.mean(pair[:, :3]) == pytest.approx(1, abs=0.02)
    assert not np.round(pair[:, 3], 4).any()


# Norm and MLP.


def test_rms_norm():
    x, scale = 3 * normal(4, 6), normal(6)
    got = layers.RMSNorm(epsilon=0.1).apply({'params': {'scale': scale}}, jnp.asarray(x))
    want = [row / np.sqrt(np.mean(row**2) + 0.1) * scale for row in x]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_rms_norm_is_computed_in_float32():
    x = jnp.full((1, 6), 300.0, jnp.bfloat16)  # its square would keep 8 bits
    got = layers.RMSNorm(dtype=jnp.bfloat16).apply({'params': {'scale': np.ones(6, np.float32)}}, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(got), 1)


def test_gated_mlp():
    x, gate, up, down = normal(3, 6), normal(6, 8), normal(6, 8), normal(8, 6)
    params = {'wi_0': {'kernel': gate}, 'wi_1': {'kernel': up}, 'wo': {'kernel': down}}
    got = layers.Mlp(8).apply({'params': params}, jnp.asarray(x))
    h = x @ gate
    np.testing.assert_allclose(got, (h / (1 + np.exp(-h)) * (x @ up)) @ down, rtol=1e-4, atol=1e-4)


# Rotary positions.


def test_rotation_is_a_complex_product_of_the_halves():
    x, positions, theta = normal(2, 5, 3, 8), RNG.integers(0, 50, (2, 5)), 100.0
    got = rotary.rotate(jnp.asarray(x), rotary.rope_table(jnp.array(positions), 8, theta))
    for b, t, h in np.ndindex(2, 5, 3):
        turns = np.exp(1j * positions[b, t] * theta ** (-np.arange(4) / 4))
        z = (x[b, t, h, :4] + 1j * x[b, t, h, 4:]) * turns
        np.testing.assert_allclose(got[b, t, h], np.concatenate([z.real, z.imag]), atol=1e-5)


def test_scores_depend_on_the_distance_alone():
    q, k = jnp.asarray(normal(1, 1, 8)), jnp.asarray(normal(1, 1, 8))

    def score(i, j):
        at = lambda t: rotary.rope_table(jnp.array([t]), 8, 100.0)  # noqa: E731
        return float((rotary.rotate(q, at(i)) * rotary.rotate(k, at(j))).sum())

    assert score(3, 1) == pytest.approx(score(40, 38), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(1, 3), abs=1e-2)


def test_tables_are_float32_far_out():
    sin, cos = rotary.rope_table(jnp.array([100_000]), 8, 1e4)
    angles = 100_000 * 1e4 ** (-np.arange(4) / 4)
    np.testing.assert_allclose([sin[0], cos[0]], [np.sin(angles), np.cos(angles)], atol=0.02)


# Attention.

attend = jax.jit(segmented.attend)


def slow_attention(query, segments):
    """One query at a time, its keys laid end to end. [B, K, R, H, E] -> [B, K, R, H E]."""
    B, K, R, H, E = query.shape
    out = np.zeros((B, K, R, H, E))
    for b, k, r, h in np.ndindex(B, K, R, H):
        keys, values = [], []
        for key, value, mask, _ in segments:
            own = (b, k) if key.ndim == 5 else (b,)
            seen = np.broadcast_to(mask, (B, K, R, key.shape[-3]))[b, k, r]
            n = h * key.shape[-2] // H
            keys.append(key[own][seen, n])
            values.append(value[own][seen, n])
        keys, values = np.concatenate(keys), np.concatenate(values)
        weights = np.exp(keys @ query[b, k, r, h] / np.sqrt(E))
        out[b, k, r, h] = weights @ values / weights.sum()
    return out.reshape(B, K, R, H * E)


def segments(B, K, R, N, E):
    """A prompt that the branches share, what they have read so far, and themselves."""
    prompt_mask = np.arange(6) < np.array([6, 1])[:, None, None, None]
    own = normal(B, K, R, N, E), normal(B, K, R, N, E), np.tri(R, dtype=bool)[None, None]
    cached = normal(B, K, 3, N, E), normal(B, K, 3, N, E), (np.arange(3) < 2)[None, None, None]
    return [segmented.Segment(*s) for s in [(normal(B, 6, N, E), normal(B, 6, N, E), prompt_mask), own, cached]]


@pytest.mark.parametrize('N', [4, 2, 1])
def test_attention_over_segments_equals_the_slow_one(N):
    B, K, R, H, E = 2, 3, 4, 4, 6
    query, keys = normal(B, K, R, H, E), segments(B, K, R, N, E)
    np.testing.assert_allclose(attend(query, keys), slow_attention(query, keys), atol=1e-5)


def test_what_is_masked_cannot_be_told():
    query, (prompt, own, cached) = normal(2, 3, 4, 4, 6), segments(2, 3, 4, 2, 6)
    before = attend(query, [prompt, own, cached])
    hidden = ~prompt[2][:, 0, 0]
    for x in prompt[:2]:
        x[hidden] = 1e6
    for x in cached[:2]:
        x[:, :, 2] = -1e6
    np.testing.assert_array_equal(attend(query, [prompt, own, cached]), before)


def test_a_query_that_may_see_nothing_stays_finite():
    query, key = normal(1, 1, 2, 4, 6), normal(1, 5, 2, 6)
    nothing = [segmented.Segment(key, key, np.zeros((1, 1, 1, 5), bool))]
    value, gradient = jax.jit(jax.value_and_grad(lambda q: segmented.attend(q, nothing).sum()))(query)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_softmax_is_float32_whatever_the_query():
    query, keys = normal(1, 1, 4, 4, 6), segments(2, 1, 4, 2, 6)[1:2]
    keys = [segmented.Segment(s.key[:1], s.value[:1], s.mask) for s in keys]
    low = jax.tree.map(lambda x: jnp.array(x, jnp.bfloat16 if x.dtype == np.float32 else bool), (query, keys))
    got = attend(*low)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), slow_attention(query, keys), atol=0.05)


# T5's positions.


def test_relative_buckets_are_t5x():
    """Literal values of T5X's formula, those at which rounding decides among them."""
    want = {0: 0, 1: 1, 15: 15, 16: 16, 18: 16, 19: 17, 64: 26, 127: 31, 128: 31}
    assert {n: relative_bias._buckets(32, 128)[n] for n in want} == want
    want = {0: 0, 7: 7, 8: 8, 11: 8, 12: 9, 16: 10, 31: 11, 32: 12, 63: 13, 64: 14, 127: 15, 128: 15}
    assert {n: relative_bias._buckets(16, 128)[n] for n in want} == want


@pytest.mark.parametrize('bidirectional', [True, False])
def test_relative_bias_looks_up_each_distance(bidirectional):
    net = relative_bias.RelativeBias(3, 32, 128, bidirectional)
    embedding = np.arange(96, dtype=np.float32).reshape(3, 32)
    bias = net.apply({'params': {'rel_embedding': embedding}}, jnp.array([0, 5, 400]), jnp.arange(500))
    assert bias.shape == (3, 3, 500) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[1] - 32, bias[0])
    behind, ahead = bias[0, 1, 3], bias[0, 1, 7]
    assert (behind, ahead) == ((2, 16 + 2) if bidirectional else (2, 0))
    assert bias[0, 2, 0] == bias[0, 2, 272] == (15 if bidirectional else 31)
    assert bias[0, 2, 310] == (14 if bidirectional else 29)


def chunked(monkeypatch, size, query, segments):
    """Attention and its gradients with room for the scores of `size` queries."""
    B, K, _, H, _ = query.shape
    monkeypatch.setattr(segmented, 'MAX_SCORES', size * B * K * H * sum(s.key.shape[-3] for s in segments))

    def total(query, keys, values, biases):
        parts = [s._replace(key=k, value=v, bias=b) for s, k, v, b in zip(segments, keys, values, biases)]
        out = segmented.attend(query, parts, softcap=5.0)
        return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

    trained = query, *([getattr(s, name) for s in segments] for name in ('key', 'value', 'bias'))
    run = jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True)
    (_, out), gradients = run(*trained)
    held = {x.aval.shape for eqn in jax.make_jaxpr(total)(*trained).eqns for x in eqn.outvars}
    return out, gradients, held


def test_queries_in_chunks_attend_to_the_same(monkeypatch):
    """One mask of its own for each query and one for all, with and without bias; 7 queries do not divide into 3s."""
    B, K, R, H, N, E = 2, 3, 7, 4, 2, 6
    causal = jnp.tri(R, dtype=bool)[None, None]
    prompt = RNG.random((B, 1, 1, 5)) < 0.7
    segments = [
        segmented.Segment(normal(B, 5, N, E), normal(B, 5, N, E), prompt),
        segmented.Segment(normal(B, K, R, N, E), normal(B, K, R, N, E), causal, normal(H, R, R)),
    ]
    query = normal(B, K, R, H, E)
    (want, gradients, whole), (got, found, held) = (chunked(monkeypatch, size, query, segments) for size in (R, 3))
    np.testing.assert_allclose(got, want, atol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, gradients)
    scores = (B, K, N, H // N, R, 5 + R)
    assert scores in whole and scores not in held
