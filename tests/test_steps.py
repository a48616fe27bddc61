"""The three learning steps on the real decoder: what they change, what they leave alone, what they never build."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import NETWORK, D, R, V

from perl_jax import types
from perl_jax.models import logprobs, lora
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim import train_state
from perl_jax.rewards.scoring import score
from perl_jax.rl import losses

KEY = jax.random.key(0)
TX = optax.adafactor(1e-2, multiply_by_parameter_scale=False)  # as gin/runs/common.gin has it
PAIRS = tiny.responses(B=4, K=2, lengths=np.array([[5, 3], [2, 4], [1, 5], [3, 3]]))
THUMBS = dataclasses.replace(tiny.thumbs(B=4), labels=np.array([[1], [0], [0], [1]], np.float32))
EXPERIENCE = tiny.experience(B=4)
BATCHES = {'sft': PAIRS, 'reward': (PAIRS, THUMBS), 'policy': EXPERIENCE}
LORA, FULL = LoraSpec(rank=4, dropout=0.1), FullSpec()
kinds = pytest.mark.parametrize('kind', BATCHES)
specs = pytest.mark.parametrize('spec', [LORA, FULL], ids=['lora', 'full'])


def start(kind, spec, network=NETWORK):
    return tiny.create(kind, spec, tiny.base(network), TX)


@functools.cache
def compiled(kind, spec):
    state = jax.eval_shape(lambda: start(kind, spec))
    return jax.jit(tiny.stepper(kind, TX)).lower(tiny.base(), state, BATCHES[kind], KEY).compile()


@dataclasses.dataclass
class Trained:
    """20 steps on one batch."""

    before: object
    after: object
    base: object
    metrics: list


@functools.cache
def trained(kind, spec):
    base, metrics = jax.tree.map(jnp.copy, tiny.base()), []
    before = state = start(kind, spec)
    for _ in range(20):
        state, now = compiled(kind, spec)(base, state, BATCHES[kind], KEY)
        metrics.append(jax.device_get(now))
    return Trained(before, state, base, metrics)


@jax.jit
def judge(base, adapter, batch):
    return score(NETWORK, lora.bind(base, adapter), batch)


@jax.jit
def read(base, batch):
    """Log-probs under the base, as the policy has them."""
    return logprobs.response_logprobs(NETWORK, {'params': base}, batch, 0.7)


@specs
@kinds
def test_the_base_stays_bit_for_bit_and_every_adapter_leaf_moves(kind, spec):
    """LoRA's A and B of every target, the head, and with full tuning every parameter."""
    run = trained(kind, spec)
    assert tiny.same(run.base, tiny.base())
    moved = jax.tree.map(lambda x, y: not np.array_equal(x, y), tiny.adapters(run.before), tiny.adapters(run.after))
    still = [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(moved) if not x]
    assert not still
    states = [run.after.policy, run.after.value] if kind == 'policy' else [run.after]
    assert [int(state.step) for state in states] == [20] * len(states)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run.after))


@specs
@pytest.mark.parametrize(('kind', 'name'), [('sft', 'loss/nll'), ('reward', 'loss/reward'), ('policy', 'loss/value')])
def test_learning(kind, name, spec):
    values = [m[name] for m in trained(kind, spec).metrics]
    assert values[-1] < 0.8 * values[0]
    assert all(m['grad_norm' if kind != 'policy' else 'grad_norm/policy'] > 0 for m in trained(kind, spec).metrics)


@specs
def test_reward_learns_to_prefer_the_chosen_and_the_thumbs_up(spec):
    run = trained('reward', spec)
    margins = [np.subtract(*np.asarray(judge(run.base, x.adapter, PAIRS)).T).mean() for x in (run.before, run.after)]
    assert margins[1] > margins[0] + 0.5
    scores = np.asarray(judge(run.base, run.after.adapter, THUMBS))
    assert scores[THUMBS.labels == 1].mean() > scores[THUMBS.labels == 0].mean() + 0.5


def test_accuracy_is_over_all_batches_of_a_kind():
    flipped = dataclasses.replace(PAIRS, targets=PAIRS.targets[:, ::-1], targets_mask=PAIRS.targets_mask[:, ::-1])
    step = jax.jit(tiny.stepper('reward', TX))
    _, metrics = step(tiny.base(), start('reward', LORA), (PAIRS, flipped), KEY)
    assert float(metrics['accuracy/pairwise']) == pytest.approx(0.5)


@specs
def test_metrics_are_of_the_state_before_the_step(spec):
    run = trained('reward', spec)
    pairs, thumbs = (np.asarray(judge(run.base, run.before.adapter, batch)) for batch in (PAIRS, THUMBS))
    metrics = run.metrics[0]
    want = losses.pairwise(pairs).mean() + losses.pointwise(thumbs, THUMBS.labels).mean()
    assert metrics['loss/reward'] == pytest.approx(float(want), rel=1e-5)
    assert metrics['accuracy/pairwise'] == np.mean(pairs[:, 0] > pairs[:, 1])
    assert metrics['accuracy/pointwise'] == np.mean((thumbs > 0) == (THUMBS.labels > 0.5))
    masks = (PAIRS.inputs_mask, PAIRS.targets_mask, THUMBS.inputs_mask, THUMBS.targets_mask)
    assert metrics['tokens'] == sum(x.sum() for x in masks)
    assert trained('sft', spec).metrics[0]['tokens'] == PAIRS.targets_mask.sum()


@specs
def test_the_value_starts_at_zero(spec):
    metrics, mask = trained('policy', spec).metrics[0], EXPERIENCE.targets_mask
    returns = np.cumsum(EXPERIENCE.rewards[..., ::-1], -1)[..., ::-1]
    want = np.where(mask, returns**2, 0).sum(-1).mean()
    assert metrics['loss/value'] == pytest.approx(want, rel=1e-5)
    want = -np.where(mask, read(tiny.base(), EXPERIENCE) * returns, 0).sum(-1).mean()
    assert metrics['loss/policy'] == pytest.approx(want, rel=1e-4)


@kinds
def test_padding_does_not_matter(kind):
    garbage = lambda x, mask: np.where(mask, x, 7)  # noqa: E731

    def other(batch):
        batch = dataclasses.replace(batch, inputs=garbage(batch.inputs, batch.inputs_mask))
        return dataclasses.replace(batch, targets=garbage(batch.targets, batch.targets_mask))

    batch, state = BATCHES[kind], trained(kind, LORA).after
    changed = tuple(map(other, batch)) if kind == 'reward' else other(batch)
    one, two = (compiled(kind, LORA)(tiny.base(), state, x, KEY) for x in (batch, changed))
    assert tiny.same(one, two)


@kinds
def test_dropout_is_drawn_anew_each_step_and_repeats_with_the_seed(kind):
    def loss(step, seed):
        state = trained(kind, LORA).after
        set_step = lambda role: dataclasses.replace(role, step=jnp.int32(step))  # noqa: E731
        if kind == 'policy':
            state = state.replace(policy=set_step(state.policy), value=set_step(state.value))
        else:
            state = set_step(state)
        _, metrics = compiled(kind, LORA)(tiny.base(), state, BATCHES[kind], jax.random.key(seed))
        return float(metrics[{'sft': 'loss/nll', 'reward': 'loss/reward', 'policy': 'loss/policy'}[kind]])

    assert loss(3, 0) == loss(3, 0)
    assert len({loss(3, 0), loss(4, 0), loss(3, 1)}) == 3


# What is never built.


@pytest.fixture
def one_position_at_a_time(monkeypatch):
    monkeypatch.setattr(logprobs, 'MAX_LOGITS', 1)


def logits_held(kind, spec, network):
    """The most positions over which a step spreads the vocabulary."""
    state = jax.eval_shape(lambda: start(kind, spec, network))
    shapes = tiny.arrays(tiny.stepper(kind, TX, network), tiny.base(network), state, BATCHES[kind], KEY)
    return max([np.prod(s[:-1]) for s in shapes if s and s[-1] == V and s[:-1] not in ((D,), ())], default=0)


@specs
@pytest.mark.parametrize('network', [NETWORK, tiny.UNTIED], ids=['tied', 'untied'])
def test_a_reward_step_builds_no_logits(spec, network):
    assert logits_held('reward', spec, network) == 0


@specs
@pytest.mark.parametrize('kind', ['sft', 'policy'])
def test_a_step_holds_the_logits_of_one_chunk(one_position_at_a_time, kind, spec):
    assert logits_held(kind, spec, NETWORK) == 4 * 2


@pytest.mark.parametrize('kind', ['sft', 'policy'])
def test_the_measure_sees_logits_where_there_are_any(kind):
    assert logits_held(kind, LORA, NETWORK) == 4 * 2 * R


def test_the_compiled_reward_step_holds_no_logits_either():
    text = compiled('reward', LORA).as_text()
    assert f'[{V},{D}]' in text  # the embedding
    assert f',{V}]' not in text.replace(f'[{D},{V}]', '')
    assert f',{V}]' in compiled('sft', LORA).as_text().replace(f'[{D},{V}]', '')


# Creating and updating.


@specs
def test_the_optimizer_sees_the_adapter_alone(spec):
    base = tiny.base()
    state = train_state.create(KEY, base, spec, optax.adam(1e-2), head=(D, 1.0))
    assert lora.count(state.opt_state) == 2 * lora.count(state.adapter) + 1
    assert lora.count(state.adapter.head) == D
    assert (lora.count(state.adapter) < 0.5 * lora.count(base)) == (spec.tuning == 'lora')


def test_update_is_one_step_of_the_optimizer():
    tx = optax.sgd(0.5)
    adapter = lora.Adapter(head={'kernel': jnp.array([1.0, 2.0])})
    state = types.TrainState(jnp.int32(3), adapter, tx.init(adapter))
    after = train_state.update(state, adapter, tx)
    assert after.adapter.head['kernel'].tolist() == [0.5, 1.0]
    assert after.step == 4


def test_head_and_pairs_are_drawn_apart():
    adapter = train_state.create(KEY, tiny.base(), LoraSpec(rank=1), TX, head=(D, 1.0)).adapter
    drawn = [np.ravel(x)[:D] for x in jax.tree.leaves(adapter) if np.any(x)]
    correlations = np.corrcoef(drawn) - np.eye(len(drawn))
    assert np.abs(correlations).max() < 0.7
