"""Every reader gives the same numbers by slices as whole, and of a file no more is read than the slice."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from perl_jax.errors import UserError
from perl_jax.interop import safetensors
from perl_jax.models import lora
from perl_jax.parallel import leaves
from perl_jax.parallel.leaves import InMemory, Merged, Stacked, Transposed
from perl_jax.parallel.partitioning import Partitioner, place

X = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)


def slices(shape):
    """Whole, the second half and a middle of each axis."""
    each = [[slice(0, n), slice(n // 2, n), slice(n // 3, max(n // 3 + 1, n - 1))] for n in shape]
    return itertools.product(*each)


def check(leaf, want, dtype='float32'):
    assert leaf.shape == want.shape
    for index in slices(want.shape):
        got = leaves.read(leaf, index, jnp.dtype(dtype))
        np.testing.assert_array_equal(got, want[index].astype(jnp.dtype(dtype)), err_msg=str(index))


@pytest.mark.parametrize('stored', [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize('limit', [1, 2**22])
def test_a_tensor_of_safetensors(stored, limit, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors.leaves, 'rows_at_once', lambda *_: limit)
    arrays = {'matrix': X, 'vector': X[0], 'scalar': X[0, 0], 'cube': X.reshape(7, 3, 4)}
    arrays = {name: np.asarray(x).astype(stored) for name, x in arrays.items()}
    save_file(arrays, tmp_path / 'model.safetensors')
    found = safetensors.entries(tmp_path)
    for name, x in arrays.items():
        for dtype in ('float32', 'bfloat16', 'float16'):
            check(found[name], x, dtype)
    check(Transposed(found['matrix']), arrays['matrix'].T)


def test_a_file_that_was_cut_after_it_was_opened(tmp_path):
    save_file({'x': X}, tmp_path / 'model.safetensors')
    entry = safetensors.entries(tmp_path)['x']
    with (tmp_path / 'model.safetensors').open('r+b') as file:
        file.truncate(entry.offset + 100)
    with pytest.raises(UserError, match='truncated'):
        entry.read()


def test_layers_of_several_dtypes_are_each_cast_by_themselves():
    """float16 first would turn the second layer's 1e6 to infinity, and lose its 1e-9."""
    first, second = X.astype(np.float16), np.array(X, ml_dtypes.bfloat16)
    second[0, :2] = 1e6, 1e-9
    want = np.stack([first.astype(np.float32), second.astype(np.float32)])
    check(Stacked([InMemory(first), InMemory(second)]), want)
    check(Stacked([Transposed(InMemory(first)), Transposed(InMemory(second))]), want.swapaxes(1, 2), 'bfloat16')


@pytest.mark.parametrize('tile', [(2, 5), (256, 1024)])
def test_a_merged_kernel_is_the_same_by_any_slices(tile, monkeypatch):
    monkeypatch.setattr(leaves, 'TILE', tile)
    rng = np.random.default_rng(1)
    kernel = np.stack([X, X + 1]).astype(ml_dtypes.bfloat16)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 7, 3), (2, 3, 12)))
    leaf = Merged(InMemory(kernel), kernel.dtype, a, b, 0.5)
    all_of_it = leaves.read(leaf, leaves.full_index(leaf.shape), kernel.dtype)
    check(leaf, all_of_it)
    check(leaf, all_of_it, 'bfloat16')
    adapter = lora.Adapter(lora={'x': {'a': a, 'b': b}}, scale=0.5)
    want = lora.merge({'x': {'kernel': jnp.asarray(kernel)}}, adapter)['x']['kernel']
    np.testing.assert_allclose(all_of_it.astype(np.float32), np.asarray(want, np.float32), rtol=1e-2)


def test_a_placed_array_keeps_its_dtype_and_is_not_the_hosts():
    x = np.array(X)
    placed = place(x, Partitioner().sharding(), x.dtype)
    x[...] = 0
    np.testing.assert_array_equal(placed, X)
    tree = Partitioner().place({'a': X, 'b': InMemory(X)}, {'a': placed.sharding, 'b': placed.sharding}, 'bfloat16')
    assert tiny.same(tree, jax.tree.map(lambda _: jnp.asarray(X, jnp.bfloat16), tree))
