"""The sampler: one prefill of the prompt, then K branches token by token until every one has ended.

1. read the prompt once        2. draw each branch's first token from its last hidden state
3. while any branch goes on:   read the tokens just drawn, draw the next ones
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from perl_jax import masked, sharded
from perl_jax.errors import UserError, check_count, check_number
from perl_jax.models import lora
from perl_jax.models.logprobs import logits as token_logits
from perl_jax.optim import accumulate
from perl_jax.types import Prompts, Rollout, Variables


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Attributes:
      num_samples: K, responses to each prompt.
      max_decode_length: R, tokens of a response at most, its EOS included.
      temperature: logits are divided by it; 0 is greedy. The paper takes 0.7 (0.9 for its VQA).
      top_k: only the so many likeliest tokens are drawn; 0 is all.
      top_p: only the likeliest tokens that make up this probability are drawn; 1 is all.
      num_microbatches: prompts are sampled in so many parts, one after the other, where the cache of all is too large.

    Raises:
      UserError: a setting out of range, by the name of its macro.
    """

    num_samples: int = 1
    max_decode_length: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_microbatches: int = 1

    def __post_init__(self) -> None:
        check_count('MAX_DECODE_LENGTH', self.max_decode_length)
        check_count('NUM_SAMPLES', self.num_samples)
        check_count('SamplingConfig.num_microbatches', self.num_microbatches)
        check_count('SamplingConfig.top_k', self.top_k, 0)
        check_number('TEMPERATURE', self.temperature, 0)
        check_number('SamplingConfig.top_p', self.top_p, above=0, most=1)

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from less than the policy's whole distribution."""
        return self.top_k > 0 or self.top_p < 1.0


def sample(
    network: nn.Module,
    variables: Variables,
    prompts: Prompts,
    rng: jax.Array,
    eos_ids: int | Sequence[int],
    config: SamplingConfig,
) -> Rollout:
    """Draw K responses of at most R tokens for each of B prompts. Pure: the same `rng` draws the same tokens.

    Each prompt is read once for all of its responses. Jit it, with `config` and `network` static.

    Args:
      network: a Decoder, a T5, or a module with their methods.
      variables: whose responses they are, `bind(base, adapter)`.
      prompts: [B, P].
      rng: a key of jax.random.
      eos_ids: any of these tokens ends a response, which keeps it as its last token.
      config: K, R and the distribution.

    Returns:
      A Rollout, [B, K, R]. Its `logprobs` (float32, nats) are those of the distribution that was drawn from, after
      temperature, top-k and top-p; of greedy tokens those at temperature 1. A response that ran out of room has no EOS.

    Raises:
      UserError: the prompts do not divide into microbatches.
    """
    draw, parts = functools.partial(_sample, network, variables, eos_ids, config), config.num_microbatches
    if parts == 1:
        return draw(prompts, rng)
    if len(prompts.inputs) % (parts * sharded.partitions('batch')):
        rows = sharded.partitions('batch')
        raise UserError(
            f'SamplingConfig.num_microbatches = {parts}: {len(prompts.inputs)} prompts on {rows} rows of the mesh do '
            f'not divide into so many parts; give a divisor of {len(prompts.inputs) // rows}'
        )
    return accumulate.one_by_one(draw, prompts, parts, rng)


def make_sampler(network: nn.Module, eos_ids: int | Sequence[int], out_shardings: Any = None) -> Callable[..., Rollout]:
    """`sample` of one role, jitted: (base, adapter or None, prompts, rng, config) -> Rollout; each config compiles."""

    def draw(
        base: PyTree, adapter: lora.Adapter | None, prompts: Prompts, rng: jax.Array, config: SamplingConfig
    ) -> Rollout:
        return sample(network, lora.bind(base, adapter), prompts, rng, eos_ids, config)

    return jax.jit(draw, static_argnames='config', out_shardings=out_shardings)


class _State(struct.PyTreeNode):
    """What the loop over tokens hands on.

    Attributes:
      t: the place in the responses that is drawn next.
      tokens, logprobs, mask: the responses so far, 0 where nothing was drawn; see Rollout.
      alive: which branches have not ended.
      cache: the network's keys and values.
    """

    t: Int[Array, '']
    tokens: Int[Array, 'B K R']
    logprobs: Float[Array, 'B K R']
    mask: Bool[Array, 'B K R']
    alive: Bool[Array, 'B K']
    cache: PyTree


def _sample(
    network: nn.Module,
    variables: Variables,
    eos_ids: int | Sequence[int],
    config: SamplingConfig,
    prompts: Prompts,
    rng: jax.Array,
) -> Rollout:
    B, K, R = prompts.inputs.shape[0], config.num_samples, config.max_decode_length

    def draw(hidden: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = truncate(token_logits(network, variables, hidden), config)
        logits -= logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits)  # softmax, but for a division
        if config.temperature == 0:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = categorical(jax.random.fold_in(rng, t), weights)
        picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        return token, picked - jnp.log(weights.sum(-1))

    def write(state: _State, t: jax.Array, hidden: jax.Array) -> _State:
        token, logprob = draw(hidden, t)
        return state.replace(
            tokens=state.tokens.at[:, :, t].set(jnp.where(state.alive, token, 0)),
            logprobs=state.logprobs.at[:, :, t].set(jnp.where(state.alive, logprob, 0.0)),
            mask=state.mask.at[:, :, t].set(state.alive),
            alive=state.alive & ~masked.is_any(token, eos_ids),
        )

    def body(state: _State) -> _State:
        last_token, t = state.tokens[:, :, state.t - 1], state.t
        hidden, cache = network.apply(variables, last_token, t - 1, state.cache, method='decode')
        return write(state, t, hidden).replace(t=t + 1, cache=cache)

    last, cache = network.apply(variables, prompts.inputs, prompts.inputs_mask, K, R, method='prefill')
    empty = _State(
        t=jnp.int32(1),
        tokens=jnp.zeros((B, K, R), jnp.int32),
        logprobs=jnp.zeros((B, K, R)),
        mask=jnp.zeros((B, K, R), bool),
        alive=jnp.ones((B, K), bool),
        cache=cache,
    )
    first = write(empty, jnp.int32(0), jnp.broadcast_to(last[:, None], (B, K, last.shape[-1])))
    state = jax.lax.while_loop(lambda state: (state.t < R) & state.alive.any(), body, first)
    return Rollout(prompts.inputs, prompts.inputs_mask, state.tokens, state.mask, state.logprobs)


def categorical(rng: jax.Array, weights: jax.Array) -> jax.Array:
    """A token of each row [..., V] in proportion to its weight, int32 [...]; never one of weight 0.

    First a block of about sqrt(V) tokens is drawn, then a token of the block, each from one random number: to invert a
    cumulative sum takes two numbers a row, where Gumbel's trick (jax.random.categorical) takes V.
    """
    V = weights.shape[-1]
    root = math.isqrt(V - 1) + 1
    size = next((n for n in range(root, root // 4, -1) if V % n == 0), root)  # leaves nothing over, if one does
    blocks = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -V % size)])
    blocks = blocks.reshape(*weights.shape[:-1], -1, size)
    first, second = jax.random.split(rng)
    block = _invert(first, blocks.sum(-1))
    chosen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * size + _invert(second, chosen)


def _invert(rng: jax.Array, weights: jax.Array) -> jax.Array:
    """An index of the last axis in proportion to its weight: the first whose cumulative sum exceeds a random part."""
    total, there = jnp.cumsum(weights, axis=-1), weights > 0
    part = jax.random.uniform(rng, weights.shape[:-1]) * jnp.where(there, total, 0).max(-1)
    return jnp.argmax(there & (total > part[..., None]), axis=-1).astype(jnp.int32)


def truncate(logits: jax.Array, config: SamplingConfig) -> jax.Array:
    """Logits [..., V] after temperature, with all but the top-k and the top-p nucleus at -inf (ties are kept)."""
    if config.temperature > 0:
        logits = logits / config.temperature
    if config.top_k > 0:
        top, _ = jax.lax.top_k(logits, min(config.top_k, logits.shape[-1]))
        logits = jnp.where(logits < top[..., -1:], -jnp.inf, logits)
    if config.top_p < 1.0:
        ranked = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ranked), axis=-1) - jax.nn.softmax(ranked)
        lowest = jnp.where(before < config.top_p, ranked, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return logits
