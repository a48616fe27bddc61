"""The sampler: one prefill of the prompt, then K branches token by token until all have ended.

1. read the prompt once             2. draw each branch's first token from the prompt's last hidden state
3. while any branch has not ended:  read the tokens just drawn, draw the next ones
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from annotated_types import Interval
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from perl_jax import masked, settings, sharded
from perl_jax.errors import UserError
from perl_jax.models import lora
from perl_jax.models.logprobs import logits as token_logits
from perl_jax.optim import accumulate
from perl_jax.types import Prompts, Rollout, Variables


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are drawn.

    Attributes:
      num_samples: K, responses to each prompt.
      max_decode_length: R, the most tokens of a response, its EOS included.
      temperature: divides the logits; 0 is greedy. The paper takes 0.7 (0.9 for its VQA).
      top_k: draw from the top_k most likely tokens; 0 is all.
      top_p: draw from the most likely tokens whose probabilities add up to top_p; 1 is all.
      num_microbatches: sample the prompts in this many microbatches, where one cache of all would be too large.

    Raises:
      UserError: a setting of another type, or out of range.
    """

    num_samples: settings.Count = 1
    max_decode_length: settings.Count = 128
    temperature: Annotated[float, Interval(ge=0, le=100)] = 1.0
    top_k: settings.Natural = 0
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    num_microbatches: settings.Count = 1

    def __post_init__(self) -> None:
        settings.check(self)

    @property
    def truncates(self) -> bool:
        """Whether tokens are drawn from a truncated distribution."""
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

    Each prompt is read once for all of its responses. To jit it, make `config` and `network` static.

    Args:
      network: a Decoder, a T5, or another Network (models/network.py).
      variables: of the role that responds, `bind(base, adapter)`.
      prompts: [B, P].
      rng: a key of jax.random.
      eos_ids: any of these tokens ends a response; it is the response's last token.
      config: K, R and the distribution.

    Returns:
      A Rollout, [B, K, R]. Its `logprobs` (float32, nats) belong to the distribution that tokens were drawn from, after
      temperature, top-k and top-p; greedy tokens have those at temperature 1. A response of R tokens may lack an EOS.

    Raises:
      UserError: num_microbatches does not divide the prompts.
    """
    draw, count = functools.partial(_sample, network, variables, eos_ids, config), config.num_microbatches
    if count == 1:
        return draw(prompts, rng)
    if len(prompts.inputs) % (count * sharded.partitions('batch')):
        size = sharded.partitions('batch')
        raise UserError(
            f'SamplingConfig.num_microbatches = {count}: {len(prompts.inputs)} prompts on a data-parallel size of '
            f'{size} cannot be divided by it; give a divisor of {len(prompts.inputs) // size}'
        )
    return accumulate.map_microbatches(draw, prompts, count, rng)


def make_sampler(network: nn.Module, eos_ids: int | Sequence[int], out_shardings: Any = None) -> Callable[..., Rollout]:
    """Jit `sample` for one role. Each new config compiles.

    Args:
      network: as in `sample`.
      eos_ids: as in `sample`.
      out_shardings: of the rollout; None leaves them to XLA.

    Returns:
      (base, adapter or None, prompts, rng, config) -> Rollout.
    """

    def draw(
        base: PyTree, adapter: lora.Adapter | None, prompts: Prompts, rng: jax.Array, config: SamplingConfig
    ) -> Rollout:
        return sample(network, lora.bind(base, adapter), prompts, rng, eos_ids, config)

    return jax.jit(draw, static_argnames='config', out_shardings=out_shardings)


class _State(struct.PyTreeNode):
    """The state of the loop over tokens.

    Attributes:
      t: position in the responses that is drawn next.
      tokens, logprobs, mask: the responses so far, 0 where nothing was drawn; see Rollout.
      alive: branches that have not ended.
      cache: keys and values of prompts and responses.
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

    def draw(hidden: Float[Array, 'B K D'], t: Int[Array, '']) -> tuple[Int[Array, 'B K'], Float[Array, 'B K']]:
        logits = truncate(token_logits(network, variables, hidden), config)
        logits -= logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits)  # softmax without its normalization
        if config.temperature == 0:
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            token = categorical(jax.random.fold_in(rng, t), weights)
        token_logit = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
        return token, token_logit - jnp.log(weights.sum(-1))

    def write(state: _State, t: Int[Array, ''], hidden: Float[Array, 'B K D']) -> _State:
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


def categorical(rng: jax.Array, weights: Float[Array, '*batch V']) -> Int[Array, '*batch']:
    """Draw a token from each row of weights, in proportion to them and never one of weight 0.

    First a block of about sqrt(V) tokens is drawn, then a token of that block, each by inverting a cumulative sum. That
    takes two random numbers a row, where Gumbel's trick (jax.random.categorical) takes V.

    Args:
      rng: a key of jax.random.
      weights: float [..., V], not negative; they need not add up to 1.

    Returns:
      int32 [...].
    """
    V = weights.shape[-1]
    root = math.isqrt(V - 1) + 1
    size = next((n for n in range(root, root // 4, -1) if V % n == 0), root)  # no padding, if a divisor is near
    blocks = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -V % size)])
    blocks = blocks.reshape(*weights.shape[:-1], -1, size)
    block_rng, token_rng = jax.random.split(rng)
    block = _invert_cdf(block_rng, blocks.sum(-1))
    block_weights = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    return block * size + _invert_cdf(token_rng, block_weights)


def _invert_cdf(rng: jax.Array, weights: Float[Array, '*batch n']) -> Int[Array, '*batch']:
    """Draw an index of the last axis: the first whose cumulative weight exceeds a random share of the total."""
    cumulative, possible = jnp.cumsum(weights, axis=-1), weights > 0
    threshold = jax.random.uniform(rng, weights.shape[:-1]) * jnp.where(possible, cumulative, 0).max(-1)
    return jnp.argmax(possible & (cumulative > threshold[..., None]), axis=-1).astype(jnp.int32)


def truncate(logits: Float[Array, '*batch V'], config: SamplingConfig) -> Float[Array, '*batch V']:
    """Divide logits by the temperature, and set those outside of the top-k and the top-p nucleus to -inf (ties stay).

    Args:
      logits: float32 [..., V].
      config: temperature, top_k and top_p; at temperature 0 logits are not divided.

    Returns:
      float32 [..., V].
    """
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
