"""LoRA on modules that know nothing of it: Flax's own, some under nn.scan, and T5X's where it is installed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from flax import traverse_util

from perl_jax.errors import UserError
from perl_jax.models import lora
from perl_jax.models.intercept import intercept
from perl_jax.models.lora import LoraSpec

D, H, E, L, T = 12, 3, 2, 4, 5
KEY = jax.random.key(0)
X = np.random.default_rng(0).standard_normal((2, T, D)).astype(np.float32)
SPEC = LoraSpec(rank=2, alpha=6.0, targets=r'(.*/)?(wi|wo|query|key|value|out)')


class Block(nn.Module):
    """Kernels of two and of three axes, with and without bias, and one layer that is called twice."""

    @nn.compact
    def __call__(self, x, _=None):
        attend = nn.MultiHeadDotProductAttention(H, qkv_features=H * E, name='attention')
        x = x + attend(nn.LayerNorm()(x))
        wo = nn.Dense(D, use_bias=False, name='wo')
        x = x + wo(nn.relu(nn.Dense(D, name='wi')(x)))
        x = x + 0.3 * jnp.tanh(wo(x))
        return nn.Dense(D, name='left_alone')(x), None


class Scanned(nn.Module):
    """Layers stacked on an axis of the author's choice: 0 as ours, 1 as scalable_t5's."""

    axis: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        return nn.scan(block, {'params': self.axis}, split_rngs={'params': True}, length=L)(name='layers')(x, None)[0]


class Once(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Block(name='block')(x)[0]


MODULES = {
    'unscanned': Once(),
    'scanned on 0': Scanned(0),
    'scanned on 1': Scanned(1),
    'scanned on -1, remat': Scanned(-1, remat=True),
}
modules = pytest.mark.parametrize('name', MODULES)


@functools.cache
def made(name):
    """The wrapped module, base parameters, and a fresh adapter."""
    net = intercept(MODULES[name], SPEC)
    return net, jax.jit(net.module.init)(KEY, X)['params'], net.init(jax.random.key(1), X)


@functools.cache
def trained(name):
    """An adapter after 10 steps towards another function, its gradients at the last, and all losses."""
    (net, base, adapter), tx = made(name), optax.adam(3e-2)
    target = np.random.default_rng(1).standard_normal(X.shape)

    @jax.jit
    def step(adapter, opt):
        loss = lambda a: jnp.mean((net.apply(lora.bind(base, a), X) - target) ** 2)  # noqa: E731
        value, grads = jax.value_and_grad(loss)(adapter)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(adapter, updates), opt, grads, value

    opt, losses = tx.init(adapter), []
    for _ in range(10):
        adapter, opt, grads, value = step(adapter, opt)
        losses.append(float(value))
    return adapter, grads, losses


@modules
def test_the_base_is_exactly_what_it_was_until_trained(name):
    net, base, adapter = made(name)
    plain = jax.jit(net.module.apply)({'params': base}, X)
    assert np.array_equal(jax.jit(net.apply)(lora.bind(base, adapter), X), plain)
    assert np.array_equal(jax.jit(net.apply)(lora.bind(base, None), X), plain)


@modules
def test_training_moves_every_pair_and_the_merged_weights_compute_the_same(name):
    net, base, fresh = made(name)
    adapter, grads, losses = trained(name)
    assert losses[-1] < 0.8 * losses[0]
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), adapter.lora, fresh.lora)
    assert all(jax.tree.leaves(moved))
    got = net.apply(lora.bind(base, adapter), X)
    merged = net.merge(base, adapter, X)
    assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, base)
    np.testing.assert_allclose(net.module.apply({'params': merged}, X), got, atol=2e-5)
    assert np.abs(got - net.module.apply({'params': base}, X)).max() > 0.1
    untouched = {path: x for path, x in traverse_util.flatten_dict(merged, sep='/').items() if 'left_alone' in path}
    assert untouched and all(
        np.array_equal(x, traverse_util.flatten_dict(base, sep='/')[p]) for p, x in untouched.items()
    )


def test_names_and_shapes():
    pairs = {name: (D, D) for name in ('wi', 'wo')} | {f'attention/{n}': (D, H * E) for n in ('query', 'key', 'value')}
    pairs['attention/out'] = (H * E, D)
    for name, prefix, stack in (
        ('unscanned', 'block', None),
        ('scanned on 0', 'layers', 0),
        ('scanned on 1', 'layers', 1),
    ):
        want = {}
        for layer, (fan_in, fan_out) in pairs.items():
            for side, shape in ('a', (fan_in, 2)), ('b', (2, fan_out)):
                shape = shape if stack is None else (*shape[:stack], L, *shape[stack:])
                want[f'{prefix}/{layer}/{side}'] = shape
        adapter = made(name)[2]
        flat = traverse_util.flatten_dict(adapter.lora, sep='/')
        assert {path: x.shape for path, x in flat.items()} == want
        assert all(np.any(x) == path.endswith('/a') for path, x in flat.items())
        assert adapter.scale == 3.0 and {x.dtype for x in flat.values()} == {jnp.dtype('float32')}


def test_where_all_kernels_are_matrices_the_plain_tools_do_as_well():
    """LoraSpec.init and lora.merge need no inputs, and take the same adapter."""
    net = intercept(nn.Sequential([nn.Dense(7), nn.relu, nn.Dense(D)]), LoraSpec(rank=2, targets='layers_.*'))
    base = net.module.init(KEY, X)['params']
    adapter = tiny.stir(net.spec.init(KEY, base))
    assert jax.tree.map(jnp.shape, net.init(KEY, X).lora) == jax.tree.map(jnp.shape, adapter.lora)
    want = net.module.apply({'params': lora.merge(base, adapter)}, X)
    np.testing.assert_allclose(net.apply(lora.bind(base, adapter), X), want, atol=1e-5)
    tiny.assert_close(net.merge(base, adapter, X), lora.merge(base, adapter), atol=1e-6)


def test_one_layer_that_is_the_whole_module():
    net = intercept(nn.Dense(7), LoraSpec(rank=1, targets=''))
    adapter = tiny.stir(net.init(KEY, X[0, 0]))
    assert {name: x.shape for name, x in adapter.lora.items()} == {'a': (D, 1), 'b': (1, 7)}


def test_dropout_only_where_bind_and_an_rng_allow_it():
    net = intercept(Once(), LoraSpec(rank=2, dropout=0.5, targets='.*wi'))
    base, adapter = made('unscanned')[1], tiny.stir(net.init(KEY, X), size=1)
    run = lambda train, rngs: net.apply(lora.bind(base, adapter, train=train), X, rngs=rngs)  # noqa: E731
    plain, one, two = run(False, None), {'dropout': jax.random.key(1)}, {'dropout': jax.random.key(2)}
    assert np.array_equal(run(False, one), plain) and np.array_equal(run(True, None), plain)
    assert not np.array_equal(run(True, one), plain) and not np.array_equal(run(True, one), run(True, two))


def test_other_collections_and_methods_pass_through():
    """A cache is read and written as without the hook."""
    net = intercept(nn.MultiHeadDotProductAttention(H, qkv_features=H * E, decode=True), LoraSpec(targets='query'))
    variables = net.module.init(KEY, X)
    base, adapter = variables['params'], tiny.stir(net.init(KEY, X))
    bound = lora.bind(base, adapter) | {'cache': variables['cache']}
    _, state = net.apply(bound, X[:, :1], mutable=['cache'])
    assert state.keys() == {'cache'} and state['cache']['cache_index'] == 1


def test_no_such_layer():
    with pytest.raises(UserError, match='matches no layer; there are: .*block/attention/query, .*block/wo'):
        intercept(Once(), LoraSpec(targets='nothing')).init(KEY, X)


def test_a_layer_that_is_no_product():
    with pytest.raises(UserError, match=r'matches layers_0, which is no matrix product'):
        intercept(nn.Sequential([nn.Conv(D, (3,))]), LoraSpec(targets='layers_0')).init(KEY, X)


def test_a_product_over_other_axes_than_the_last():
    """Whatever the sizes: here the shapes alone would allow it."""
    x = jnp.ones((2, D, D))
    trailing = intercept(nn.Sequential([nn.DenseGeneral((D,), axis=-1)]), LoraSpec(targets='layers_0'))
    trailing.init(KEY, x)
    with pytest.raises(UserError, match='matches layers_0, which is no matrix product over the trailing axes'):
        intercept(nn.Sequential([nn.DenseGeneral((D,), axis=1)]), LoraSpec(targets='layers_0')).init(KEY, x)


@jax.numpy_rank_promotion('allow')  # as T5X needs it
@pytest.mark.parametrize('example', ['t5', 'scalable_t5', 'decoder_only'])
def test_t5x(example):
    """T5X's networks, unedited: exact at first, merged after; the same parameters as without the hook."""
    pytest.importorskip('t5x', reason='needs T5X, which no package registry has')
    network = pytest.importorskip(f't5x.examples.{example}.network')
    sizes = dict(vocab_size=32, emb_dim=16, num_heads=2, head_dim=8, mlp_dim=24, dropout_rate=0.0, dtype='float32')
    tokens = np.random.default_rng(0).integers(1, 32, (2, 6))
    if example == 'decoder_only':
        config = network.TransformerConfig(**sizes, num_layers=2, mlp_activations=('gelu', 'linear'))
        module, args = network.DecoderWrapper(config), (tokens, tokens)
    else:
        layers = dict(num_encoder_layers=2, num_decoder_layers=2)
        config = network.T5Config(**sizes, **layers, mlp_activations=('gelu', 'linear'))
        module, args = network.Transformer(config), (tokens, tokens, tokens)
    net = intercept(module, LoraSpec(rank=2, targets=lora.ALL_LINEAR))
    run = {'enable_dropout': False}
    base = jax.jit(lambda key: module.init(key, *args, **run))(KEY)['params']
    adapter = net.init(KEY, *args, **run)
    plain = jax.jit(lambda p: module.apply({'params': p}, *args, **run))
    bound = jax.jit(lambda p, a: net.apply(lora.bind(p, a), *args, **run))
    assert np.array_equal(bound(base, adapter), plain(base))
    adapter = tiny.stir(adapter, size=0.05)
    want = bound(base, adapter)
    np.testing.assert_allclose(plain(net.merge(base, adapter, *args, **run)), want, atol=1e-4)
    assert np.abs(want - plain(base)).max() > 0.1
