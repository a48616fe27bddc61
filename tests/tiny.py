"""A decoder, a base, adapters and batches small enough for every test, and a policy that is nothing but a table."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from jax.extend.core import jaxprs_in_params

from perl_jax import masked, types
from perl_jax.models import lora, unpadding
from perl_jax.models.decoder import Decoder, DecoderConfig
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim import train_state
from perl_jax.parallel import partitioning
from perl_jax.rl import steps
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig
from perl_jax.train.reward import reward_step
from perl_jax.train.sft import sft_step

jax.config.update('jax_disable_most_optimizations', True)  # tests wait for the compiler, not for what it compiles

# No two axes of the network are equally long, so that a shape tells what an array is.
V, L, D, P, R = 56, 2, 32, 7, 5
EOS = 1
CONFIG = DecoderConfig(
    vocab_size=V, num_layers=L, emb_dim=D, num_heads=4, num_kv_heads=2, head_dim=6, mlp_dim=48, rope_theta=100.0
)
NETWORK = Decoder(CONFIG)
UNTIED = Decoder(dataclasses.replace(CONFIG, logits_via_embedding=False))

SPECS = {
    'lora': LoraSpec(rank=4, alpha=12.0),
    'lora-all-linear': LoraSpec(rank=2, alpha=2.0, targets=lora.ALL_LINEAR),
    'full': FullSpec(),
}
specs = pytest.mark.parametrize('spec', SPECS.values(), ids=SPECS)

OBJECTIVE = Objective()


@functools.cache
def base(network=NETWORK, seed=0):
    """Parameters that look trained: hidden states of size 1, log-probs from -0.1 to -10."""
    shapes, _ = partitioning.abstract_params(network)
    rng, params = np.random.default_rng(seed), {}
    for path, x in traverse_util.flatten_dict(shapes, sep='/').items():
        noise = rng.standard_normal(x.shape)
        if path.endswith('scale'):
            params[path] = 1 + 0.1 * noise
        else:
            params[path] = noise * (0.4 if path.endswith('embedding') else x.shape[-2] ** -0.5)
    with jax.ensure_compile_time_eval():  # whoever asks first may be under jit
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32), traverse_util.unflatten_dict(params, sep='/'))


def stir(tree, seed=1, size=0.1):
    """Noise on every leaf: an adapter as training leaves it, LoRA's B no longer zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + np.float32(size) * rng.standard_normal(x.shape, np.float32), tree)


def adapter(spec, params, seed=1, head=True):
    """An adapter in the middle of its training."""
    fresh = spec.init(jax.random.key(seed), params)
    return stir(lora.with_head(fresh, jax.random.key(seed + 1), D, 0.5) if head else fresh, seed)


def ragged(rng, lengths, width, vocab=V):
    """Tokens [.., width] and their mask; the padding is garbage, since no token id may be special."""
    mask = np.arange(width) < np.asarray(lengths)[..., None]
    return rng.integers(0, vocab, mask.shape).astype(np.int32), mask


def responses(B=3, K=2, seed=0, lengths=None):
    """A batch of every length: a prompt of one token and a full one, an empty response and a full one."""
    rng = np.random.default_rng(seed)
    prompt_lengths = [1, P, *rng.integers(2, P, B)][:B]
    if lengths is None:
        lengths = np.reshape([0, R, *rng.integers(1, R + 1, B * K)][: B * K], (B, K))
    return types.Responses(*ragged(rng, prompt_lengths, P), *ragged(rng, lengths, R))


def thumbs(B=3, seed=0, K=1):
    batch = responses(B, K, seed, lengths=np.random.default_rng(seed).integers(1, R + 1, (B, K)))
    labels = np.random.default_rng(seed).integers(0, 2, (B, K)).astype(np.float32)
    return types.Thumbs(batch.inputs, batch.inputs_mask, batch.targets, batch.targets_mask, labels)


def experience(B=3, K=2, seed=0):
    """A judged rollout, made up."""
    rng = np.random.default_rng(seed)
    batch = responses(B, K, seed, lengths=rng.integers(1, R + 1, (B, K)))
    noise = [np.where(batch.targets_mask, rng.standard_normal((B, K, R)), 0).astype(np.float32) for _ in range(3)]
    return types.Experience(batch.inputs, batch.inputs_mask, batch.targets, batch.targets_mask, *noise)


def without_padding(batch, groups=1, parts=1, buckets=16):
    """The batch, saying its fill."""
    KR = batch.targets[0].size
    real = batch.inputs_mask.sum(-1), batch.targets_mask.reshape(-1, KR).sum(-1)
    split = {'groups': groups, 'num_microbatches': parts, 'buckets': buckets}
    n = unpadding.count_buckets(*real, batch.inputs.shape[-1], KR, **split)
    return unpadding.with_fill(batch, n, buckets)


def prompts(batch):
    return types.Prompts(batch.inputs, batch.inputs_mask)


def create(kind, spec, params, tx):
    """The state of a role at step 0, as the loops make it; `kind` is sft, reward or policy."""
    key = jax.random.key(0)
    if kind == 'sft':
        return train_state.create(key, params, spec, tx)
    if kind == 'reward':
        return train_state.create(key, params, spec, tx, head=(D, (D + 1) ** -0.5))
    value = train_state.create(jax.random.key(1), params, spec, tx, head=(D, 0))
    return types.PolicyState(train_state.create(key, params, spec, tx), jnp.float32(0.1), value)


def stepper(kind, tx, network=NETWORK):
    """step(base, state, batch, rng) -> state, metrics"""
    if kind == 'policy':
        return policy_stepper((tx, tx), network, Objective(sampling=SamplingConfig(temperature=0.7)))
    return functools.partial({'sft': sft_step, 'reward': reward_step}[kind], network, tx)


def policy_stepper(txs, network=NETWORK, objective=OBJECTIVE, **given):
    """One update of value and policy: step(base, state, batch, rng), as learner.learn makes it."""

    def step(base, state, batch, rng):
        values, metrics = None, {}
        if objective.algorithm.has_value:
            value, values, metrics = steps.value_step(
                network, objective, txs[1], base=base, state=state.value, batch=batch, rng=rng, **given
            )
            state = state.replace(value=value)
        policy, more = steps.policy_step(
            network, objective, txs[0], base=base, anchor=(base, state.anchor), state=state.policy, batch=batch,
            values=values, beta=state.beta, rng=rng, **given,
        )  # fmt: skip
        return state.replace(policy=policy), metrics | more

    return step


def adapters(state):
    return (state.policy.adapter, state.value.adapter) if isinstance(state, types.PolicyState) else state.adapter


@functools.partial(jax.jit, static_argnames=('network', 'train'))
def hidden(params, adapter, batch, rngs=None, *, network=NETWORK, train=False):
    """Hidden states [B, K, R + 1, D] under one role."""
    variables = lora.bind(params, adapter, train=train)
    return network.apply(variables, batch.inputs, batch.inputs_mask, batch.targets, rngs=rngs)


def one_by_one(batch):
    """Each response behind its own prompt as one run of tokens: (b, k, tokens, length of the prompt) each."""
    for b, k in itertools.product(range(batch.targets.shape[0]), range(batch.targets.shape[1])):
        prompt = batch.inputs[b][batch.inputs_mask[b]]
        yield b, k, np.concatenate([prompt, batch.targets[b, k][batch.targets_mask[b, k]]]), len(prompt)


def apart(params):
    """The leaves by their paths as T5X and transformers have them: `layers` [L, ...] is `layers_0`, `layers_1`, ..."""
    flat = {}
    for path, x in traverse_util.flatten_dict(params, sep='/').items():
        if '/layers/' in path:
            flat |= {path.replace('layers', f'layers_{i}', 1): each for i, each in enumerate(x)}
        else:
            flat[path] = x
    return flat


def arrays(fun, *args):
    """The shape of every array that a function computes, those inside loops and other functions too."""
    found = set()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found.update(v.aval.shape for v in eqn.outvars if hasattr(v.aval, 'shape'))
            for inner in jaxprs_in_params(eqn.params):
                walk(inner)

    walk(jax.make_jaxpr(fun)(*args).jaxpr)
    return found


def same(one, two):
    """Whether two trees hold the same bits."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def assert_close(one, two, **tolerance):
    jax.tree.map_with_path(
        lambda path, a, b: np.testing.assert_allclose(a, b, err_msg=jax.tree_util.keystr(path), **tolerance), one, two
    )


@dataclasses.dataclass(frozen=True)
class TableConfig:
    vocab_size: int
    emb_dim: int


class Table(nn.Module):
    """A policy that sees only the token before, as one-hot hidden state: logits = table[token]. D is V."""

    config: TableConfig

    def setup(self):
        self.table = self.param('table', nn.initializers.zeros, (self.config.vocab_size,) * 2)

    def __call__(self, inputs, inputs_mask, targets, ends=None):
        B, K, _ = targets.shape
        first = jnp.broadcast_to(self._last(inputs, inputs_mask)[:, None, None], (B, K, 1))
        seen = jnp.concatenate([first, targets], axis=2)
        return self._see(seen if ends is None else jnp.take_along_axis(seen, ends[..., None], axis=2)[..., 0])

    def prefill(self, inputs, inputs_mask, K, R):
        return self._see(self._last(inputs, inputs_mask)), None

    def decode(self, tokens, step, cache):
        return self._see(tokens), cache

    def logits(self, hidden):
        return hidden @ self.table

    def _last(self, inputs, inputs_mask):
        return jnp.take_along_axis(inputs, masked.lengths(inputs_mask)[:, None] - 1, axis=1)[:, 0]

    def _see(self, tokens):
        return jax.nn.one_hot(tokens, self.config.vocab_size)


def table(V):
    return Table(TableConfig(V, V))
