"""Log-probs, entropy and KL of target tokens, without all of the logits in memory at once.

`hidden[..., t, :]` is the state that predicts `targets[..., t]`. For a batch with a `fill`, hidden is [G, 1, C, D], of
real targets alone, and the results are 0 at the padding (unpadding.py). Logits are computed for a chunk of positions at
a time; a backward pass that needs them computes them again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, PyTree, Shaped

from perl_jax import sharded
from perl_jax.models import unpadding
from perl_jax.types import Responses, Variables

MAX_LOGITS = 2**24  # floats of logits per device: 64 MiB, two to three times that under a gradient


def logits(network: nn.Module, variables: Variables, hidden: Float[Array, '*batch D']) -> Float[Array, '*batch V']:
    """Logits of hidden states.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: `bind(base, adapter)`.
      hidden: [..., D], in the network's dtype.

    Returns:
      float32 [..., V].
    """
    return cast(jax.Array, network.apply(variables, hidden, method='logits'))  # a pair only with `mutable`


def token_logprobs(
    network: nn.Module,
    variables: Variables,
    hidden: Float[Array, 'b k t D'],
    batch: Responses,
    temperature: float = 1.0,
) -> Float[Array, 'B K R']:
    """log softmax(logits / temperature) at each target.

    The custom_vjp computes each log-prob's gradient to its hidden state in the forward pass, while the logits exist,
    and saves it [B, K, R, D]. The backward pass of a frozen output layer then needs no logits; that of a trained one
    computes them again.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: `bind(base, adapter)`.
      hidden: [B, K, R, D], or [G, 1, C, D] for a batch with a fill: `response_hidden`.
      batch: prompts and responses, whose targets these are.
      temperature: the logits are divided by it.

    Returns:
      float32 [B, K, R], nats; at the padding 0 for a batch with a fill, else any value.
    """

    def plain(variables: Variables, hidden: jax.Array, targets: jax.Array) -> jax.Array:
        return _target_logprobs(logits(network, variables, hidden) / temperature, targets)

    def forward(variables: Variables, hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, Any]:
        out, vjp = jax.vjp(lambda hidden: plain(variables, hidden, targets), hidden)
        return out, (variables, hidden, targets, *vjp(jnp.ones_like(out)))

    def backward(residuals: Any, cotangent: jax.Array) -> tuple[Variables, jax.Array, None]:
        variables, hidden, targets, hidden_grad = residuals
        _, vjp = jax.vjp(lambda variables: plain(variables, hidden, targets), variables)  # dead code if frozen
        return *vjp(cotangent), (cotangent[..., None] * hidden_grad).astype(hidden_grad.dtype), None

    logprob_fn = jax.custom_vjp(plain)
    logprob_fn.defvjp(forward, backward)
    targets = unpadding.unpad(batch.targets, batch)
    out = _by_chunk(functools.partial(logprob_fn, variables), network.config.vocab_size, hidden, targets)
    return unpadding.pad(out, batch)


def token_logprobs_entropy(
    network: nn.Module,
    variables: Variables,
    hidden: Float[Array, 'b k t D'],
    batch: Responses,
    temperature: float = 1.0,
) -> tuple[Float[Array, 'B K R'], Float[Array, 'B K R']]:
    """`token_logprobs`, and the entropy of the distribution at each position.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: `bind(base, adapter)`.
      hidden: [B, K, R, D], or [G, 1, C, D] for a batch with a fill: `response_hidden`.
      batch: prompts and responses, whose targets these are.
      temperature: the logits are divided by it.

    Returns:
      Log-probs and entropies, float32 [B, K, R] each, nats; at the padding as in `token_logprobs`.
    """

    def logprob_and_entropy(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        scaled = logits(network, variables, hidden) / temperature
        logps = jax.nn.log_softmax(scaled)
        return _target_logprobs(scaled, targets), -(jnp.exp(logps) * logps).sum(-1)

    targets = unpadding.unpad(batch.targets, batch)
    out = _by_chunk(jax.checkpoint(logprob_and_entropy), network.config.vocab_size, hidden, targets)
    return unpadding.pad(out[0], batch), unpadding.pad(out[1], batch)


def token_kl(
    network: nn.Module,
    variables: Variables,
    hidden: Float[Array, 'b k t D'],
    anchor_variables: Variables,
    anchor_hidden: Float[Array, 'b k t D'],
    batch: Responses,
    *,
    temperature: float = 1.0,
) -> Float[Array, 'B K R']:
    """KL(policy || anchor) over the whole vocabulary at each position.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: the policy's, `bind(base, adapter)`.
      hidden: the policy's, [B, K, R, D], or [G, 1, C, D] for a batch with a fill: `response_hidden`.
      anchor_variables: the anchor's.
      anchor_hidden: the anchor's, of the same shape.
      batch: prompts and responses, which both have read.
      temperature: the logits of both are divided by it.

    Returns:
      float32 [B, K, R], nats; at the padding as in `token_logprobs`.
    """

    def kl(hidden: jax.Array, anchor_hidden: jax.Array) -> jax.Array:
        logps = jax.nn.log_softmax(logits(network, variables, hidden) / temperature)
        anchor = jax.nn.log_softmax(logits(network, anchor_variables, anchor_hidden) / temperature)
        return (jnp.exp(logps) * (logps - anchor)).sum(-1)

    out = _by_chunk(jax.checkpoint(kl), 2 * network.config.vocab_size, hidden, anchor_hidden)
    return unpadding.pad(out, batch)


def response_hidden(
    network: nn.Module, variables: Variables, batch: Responses, **apply: Any
) -> Float[Array, 'b k t D']:
    """The states that predict a batch's targets, in one forward pass.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: `bind(base, adapter)`.
      batch: prompts and responses.
      **apply: keyword arguments of `network.apply` (`rngs` for dropout).

    Returns:
      [B, K, R, D] in the network's dtype. For a batch with a fill, the states of real targets alone, [G, 1, C, D];
      `unpadding.pad` puts their readouts back into rows.
    """
    return unpadding.apply(network, variables, batch, **apply)


def response_logprobs(
    network: nn.Module, variables: Variables, batch: Responses, temperature: float = 1.0, **apply: Any
) -> Float[Array, 'B K R']:
    """Log-probs of a batch's responses under one role, in one forward pass.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: `bind(base, adapter)`.
      batch: prompts and responses.
      temperature: the logits are divided by it.
      **apply: keyword arguments of `network.apply` (`rngs` for dropout).

    Returns:
      float32 [B, K, R], nats; at the padding as in `token_logprobs`.
    """
    hidden = response_hidden(network, variables, batch, **apply)
    return token_logprobs(network, variables, hidden, batch, temperature)


@jax.custom_vjp
def _target_logprobs(logits: Float[Array, 'b k t V'], targets: Int[Array, 'b k t']) -> Float[Array, 'b k t']:
    """log softmax(logits) at the targets.

    The custom_vjp is for memory: JAX's own gradient would scatter into a second array as large as the logits.
    """
    return _target_logprobs_forward(logits, targets)[0]


def _target_logprobs_forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    norms = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)
    return (target_logits - norms)[..., 0], (logits, targets, norms)


def _target_logprobs_backward(residuals: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, norms = residuals
    one_hot = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    return cotangent[..., None] * (one_hot - jnp.exp(logits - norms)), None


_target_logprobs.defvjp(_target_logprobs_forward, _target_logprobs_backward)


def _by_chunk(fn: Callable[..., PyTree], vocab_size: int, *arrays: Shaped[Array, 'b k t ...']) -> PyTree:
    """Apply `fn` to arrays [B, K, R, ...], a chunk of the R positions at a time; its outputs are [B, K, R]."""
    B, K, R = arrays[0].shape[:3]
    size = max(1, min(R, MAX_LOGITS * sharded.partitions('batch') // (B * K * vocab_size)))
    chunks = -(-R // size)
    if chunks == 1:
        return fn(*arrays)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * size - R)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(B, K, chunks, size, *x.shape[3:]), 2, 0)

    out = jax.lax.map(lambda chunk: fn(*chunk), tuple(map(split, arrays)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(B, K, chunks * size)[..., :R], out)
