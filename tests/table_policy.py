"""A policy that is a table of 4 tokens, and every response of at most 2 tokens to the prompt '2'."""

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from tiny import EOS

from perl_jax import types
from perl_jax.models.lora import Adapter

VOCAB = 4
TABLE = tiny.table(VOCAB)
RNG = np.random.default_rng(0)
ANCHOR, NOISE = RNG.standard_normal((2, VOCAB, VOCAB)).astype(np.float32)
BASE, POLICY = {'table': jnp.array(ANCHOR)}, Adapter(params={'table': jnp.array(ANCHOR + 0.5 * NOISE)})
EVERY = [(EOS, 0)] + [(a, b) for a in (0, 2, 3) for b in range(VOCAB)]
N = len(EVERY)
SCORES = RNG.standard_normal((1, N)).astype(np.float32)


def responses(tokens, prompt=2):
    """One prompt and all of these responses, which end at EOS or where there is no room."""
    targets = np.array(tokens, np.int32)[None]
    before = np.cumsum(targets == EOS, axis=-1) - (targets == EOS)
    return types.Responses(np.full((1, 1), prompt, np.int32), np.ones((1, 1), bool), targets, before == 0)


def logprobs(adapter, batch, temperature=1.0):
    """Of each token under a table, by hand."""
    table = BASE['table'] if adapter is None else adapter.params['table']
    whole = jax.nn.log_softmax(table / temperature)
    first = jnp.broadcast_to(batch.inputs[:, :1, None], (*batch.targets.shape[:2], 1))
    return whole[jnp.concatenate([first, batch.targets[..., :-1]], -1), batch.targets]


def rollout(batch, temperature=1.0):
    """As the sampler hands it over: 0 at the padding."""
    given = jnp.where(batch.targets_mask, logprobs(POLICY, batch, temperature), 0)
    return jax.tree.map(jnp.asarray, types.Rollout(**vars(batch), logprobs=given))


def total(x, mask):
    return jnp.where(mask, x, 0).sum(-1)


def state(tx, kernel):
    """Policy and value at step 0; the value is the kernel's number of the token before."""
    value = Adapter(params=BASE, head={'kernel': jnp.array(kernel, jnp.float32)})
    policy, value = (types.TrainState(jnp.int32(0), x, tx.init(x)) for x in (POLICY, value))
    return types.PolicyState(policy, jnp.float32(0.25), value)
