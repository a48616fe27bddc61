"""Log-probabilities of target tokens, without ever holding all of the logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from perl_jax.types import Responses, Variables

MAX_LOGITS = 2**24  # floats held at once: 64 MiB, and as much again in the backward pass


def token_logprobs(
    network: nn.Module,
    variables: Variables,
    hidden: Float[Array, 'B K R D'],
    targets: Int[Array, 'B K R'],
    temperature: float = 1.0,
) -> Float[Array, 'B K R']:
    """log softmax(logits / temperature) at each target, float32.

    The vocabulary is only ever unrolled for a chunk of positions; the backward pass makes the chunk's logits again.
    `hidden[..., t, :]` is the state that predicts `targets[..., t]`.
    """
    (B, K, R), V = targets.shape, network.config.vocab_size
    size = max(1, min(R, MAX_LOGITS // (B * K * V)))
    chunks = -(-R // size)
    pad = chunks * size - R
    hidden = jnp.pad(hidden, ((0, 0), (0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, 0), (0, pad)))

    @jax.checkpoint
    def one(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, targets = chunk
        logits = network.apply(variables, hidden, method='logits') / temperature
        picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(logits, axis=-1)

    if chunks == 1:
        return one((hidden, targets))
    split = lambda x: jnp.moveaxis(x.reshape(B, K, chunks, size, *x.shape[3:]), 2, 0)  # noqa: E731
    out = jax.lax.map(one, (split(hidden), split(targets)))
    return jnp.moveaxis(out, 0, 2).reshape(B, K, chunks * size)[..., :R]


def response_logprobs(
    network: nn.Module, variables: Variables, batch: Responses, temperature: float = 1.0, **apply: Any
) -> Float[Array, 'B K R']:
    """Log-probs of a batch's responses under one role: one forward pass. `apply` goes to it (`rngs` for dropout)."""
    hidden = network.apply(variables, batch.inputs, batch.inputs_mask, batch.targets, **apply)
    return token_logprobs(network, variables, hidden[..., :-1, :], batch.targets, temperature)
