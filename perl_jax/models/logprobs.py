"""What is said of target tokens by their logits, without ever holding all of the logits.

`hidden[..., t, :]` is the state that predicts `targets[..., t]`. Of a batch that says its fill, hidden is [G, 1, N, D],
of real targets alone, and what comes of it is 0 at the padding (unpadding.py). The vocabulary is only ever unrolled for
a chunk of positions; a backward pass that needs the chunk's logits makes them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree

from perl_jax import sharded
from perl_jax.models import unpadding
from perl_jax.types import Responses, Variables

MAX_LOGITS = 2**24  # floats a device holds at once: 64 MiB, and two to three times that where a gradient is wanted


def logits(network: nn.Module, variables: Variables, hidden: Float[Array, '*batch D']) -> Float[Array, '*batch V']:
    """What the vocabulary's tokens are worth at hidden states, float32."""
    return cast(jax.Array, network.apply(variables, hidden, method='logits'))  # a pair only with `mutable`


def token_logprobs(
    network: nn.Module,
    variables: Variables,
    hidden: Float[Array, 'B K R D'],
    batch: Responses,
    temperature: float = 1.0,
) -> Float[Array, 'B K R']:
    """log softmax(logits / temperature) at each target, float32.

    What each log-prob's gradient to its state is, is known while its logits are there: it is kept [B, K, R, D], so that
    the backward pass of a frozen output layer needs no logits. One that is trained has them made again.
    """

    def plain(variables: Variables, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return _pick(logits(network, variables, hidden) / temperature, targets)

    def forward(variables: Variables, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
        out, back = jax.vjp(lambda hidden: plain(variables, hidden, targets), hidden)
        return out, (variables, hidden, targets, *back(jnp.ones_like(out)))

    def backward(kept: Any, given: jax.Array) -> tuple[Variables, jax.Array, None]:
        variables, hidden, targets, slope = kept
        _, back = jax.vjp(lambda variables: plain(variables, hidden, targets), variables)  # dead code if frozen
        return *back(given), (given[..., None] * slope).astype(slope.dtype), None

    one = jax.custom_vjp(plain)
    one.defvjp(forward, backward)
    targets = unpadding.unpad(batch.targets, batch)
    out = _by_chunk(functools.partial(one, variables), network.config.vocab_size, hidden, targets)
    return unpadding.pad(out, batch)


def token_logprobs_entropy(
    network: nn.Module,
    variables: Variables,
    hidden: Float[Array, 'B K R D'],
    batch: Responses,
    temperature: float = 1.0,
) -> tuple[Float[Array, 'B K R'], Float[Array, 'B K R']]:
    """`token_logprobs`, and the entropy of the distribution at each position, in nats, float32."""

    def one(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = logits(network, variables, hidden) / temperature
        logps = jax.nn.log_softmax(scaled)
        return _pick(scaled, targets), -(jnp.exp(logps) * logps).sum(-1)

    targets = unpadding.unpad(batch.targets, batch)
    out = _by_chunk(jax.checkpoint(one), network.config.vocab_size, hidden, targets)
    return unpadding.pad(out[0], batch), unpadding.pad(out[1], batch)


def token_kl(
    network: nn.Module,
    variables: Variables,
    hidden: Float[Array, 'B K R D'],
    anchor_variables: Variables,
    anchor_hidden: Float[Array, 'B K R D'],
    batch: Responses,
    *,
    temperature: float = 1.0,
) -> Float[Array, 'B K R']:
    """KL(policy || anchor) over the whole vocabulary at each position, in nats, float32."""

    def one(hidden: jax.Array, anchor_hidden: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(logits(network, variables, hidden) / temperature)
        anchor = jax.nn.log_softmax(logits(network, anchor_variables, anchor_hidden) / temperature)
        return (jnp.exp(logps) * (logps - anchor)).sum(-1)

    out = _by_chunk(jax.checkpoint(one), 2 * network.config.vocab_size, hidden, anchor_hidden)
    return unpadding.pad(out, batch)


def response_hidden(
    network: nn.Module, variables: Variables, batch: Responses, **apply: Any
) -> Float[Array, 'B K R D']:
    """The states that predict a batch's targets: one forward pass. `apply` goes to it (`rngs` for dropout).

    Of a batch that says its fill, those of real targets alone, [G, 1, N, D]; what is read off them, `unpadding.pad`
    puts back in its place.
    """
    return unpadding.apply(network, variables, batch, **apply)


def response_logprobs(
    network: nn.Module, variables: Variables, batch: Responses, temperature: float = 1.0, **apply: Any
) -> Float[Array, 'B K R']:
    """Log-probs of a batch's responses under one role: one forward pass."""
    hidden = response_hidden(network, variables, batch, **apply)
    return token_logprobs(network, variables, hidden, batch, temperature)


@jax.custom_vjp
def _pick(logits: Float[Array, 'B K T V'], targets: Int[Array, 'B K T']) -> Float[Array, 'B K T']:
    """log softmax(logits) at the targets. JAX's own gradient would scatter into zeros as large as the logits."""
    return _pick_forward(logits, targets)[0]


def _pick_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    norms = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (picked - norms)[..., 0], (logits, targets, norms)


def _pick_backward(kept: tuple[jax.Array, ...], given: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, norms = kept
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return given[..., None] * (one_hot - jnp.exp(logits - norms)), None


_pick.defvjp(_pick_forward, _pick_backward)


def _by_chunk(one: Callable[..., PyTree], vocab_size: int, *arrays: jax.Array) -> PyTree:
    """`one` of arrays [B, K, R, ...], a chunk of the positions R at a time; its outputs are [B, K, R]."""
    B, K, R = arrays[0].shape[:3]
    size = max(1, min(R, MAX_LOGITS * sharded.partitions('batch') // (B * K * vocab_size)))
    chunks = -(-R // size)
    if chunks == 1:
        return one(*arrays)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * size - R)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(B, K, chunks, size, *x.shape[3:]), 2, 0)

    out = jax.lax.map(lambda chunk: one(*chunk), tuple(map(split, arrays)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, K, chunks * size)[..., :R], out)
