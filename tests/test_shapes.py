"""Annotations are checked under pytest, shapes included: what is wrong is an error at the call or at the trace."""

import pathlib

import checked
import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import linen as nn
from jaxtyping import TypeCheckError

from perl_jax import masked
from perl_jax.models import logprobs
from perl_jax.rl import losses

PACKAGE = pathlib.Path(__file__).parents[1] / 'perl_jax'


def test_wrong_shapes_are_refused():
    with pytest.raises(TypeCheckError, match='rewards'):
        losses.pairwise(jnp.ones((3, 3)))
    with pytest.raises(TypeCheckError, match='labels'):
        losses.pointwise(jnp.ones((2, 3)), jnp.ones((3, 2)))


def test_wrong_dtypes_are_refused():
    with pytest.raises(TypeCheckError, match='mask'):
        masked.lengths(jnp.ones((2, 3)))


def test_they_are_refused_in_a_trace_too():
    with pytest.raises(TypeCheckError, match='mask'):
        jax.eval_shape(masked.total, jnp.ones((2, 3)), jnp.ones((2, 4), bool))


def test_networks_are_checked():
    batch = tiny.responses(B=3, K=2)
    with pytest.raises(TypeCheckError, match='targets'):
        jax.eval_shape(tiny.NETWORK.apply, {}, batch.inputs, batch.inputs_mask, batch.targets[:2])


class Summed(nn.Module):
    """A network whose logits have no axis left."""

    def logits(self, hidden):
        return hidden.sum()


def test_wrong_results_are_refused():
    with pytest.raises(TypeCheckError, match='return value'):
        logprobs.logits(Summed(), {}, jnp.ones((2, 3)))


def test_the_whole_core_is_checked():
    """But for modules that are listed with a reason."""
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir()} & set(checked.MODULES)
    assert {'models', 'optim', 'rewards', 'rl', 'train'} <= folders
    hooked = [name for name in checked.MODULES if name not in checked.UNCHECKED]
    assert 'masked' in hooked and folders <= set(hooked)
    for name, reason in checked.UNCHECKED.items():
        assert PACKAGE.joinpath(*name.split('.')).with_suffix('.py').exists() and reason
