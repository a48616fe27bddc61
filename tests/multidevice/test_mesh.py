"""The same steps on 1 device and on 8: losses, adapters, samples; and what lies where."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import EOS, NETWORK, D

from perl_jax import types
from perl_jax.data.datasets import DatasetConfig
from perl_jax.errors import UserError
from perl_jax.evals import infer
from perl_jax.kernels import flash
from perl_jax.models import lora
from perl_jax.models.decoder import Decoder
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim.tuning import Tuning
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rl.learner import make_learner
from perl_jax.rl.objective import Objective
from perl_jax.rl.sampling import SamplingConfig, sample
from perl_jax.rl.steps import experience
from perl_jax.runs.base import BaseConfig
from perl_jax.runs.base import load as load_base
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runs.fingerprints import fingerprint
from perl_jax.train import loop

B, K, KEY = 8, 2, jax.random.key(0)
LORA, FULL = LoraSpec(rank=4, targets='.*attention/(query|out)'), FullSpec()  # kernels split by columns and by rows
# Adam's first step is nearly the sign of the gradient, however small, and some gradients are as good as nothing: there
# the order of a sum would decide. A larger epsilon asks for a gradient before it takes a step.
TX = optax.adam(1e-2, eps=1e-4)
SAMPLING = SamplingConfig(num_samples=K, max_decode_length=5, temperature=0.7)
BATCHES = {
    'sft': tiny.responses(B, K),
    'reward': (tiny.responses(B, K),),
    'policy': tiny.experience(B, K),
}
FSDP = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
MESHES = {
    '8x1': Partitioner(1),
    '4x2': Partitioner(2),
    '2x4': Partitioner(4),
    'fsdp': Partitioner(1, logical_axis_rules=FSDP),
    'all': Partitioner(2, 2, FSDP),  # 2 replicas of 2 x 2
}
CASES = [(kind, LORA, mesh) for kind in BATCHES for mesh in MESHES if mesh != '4x2'] + [('policy', FULL, '2x4')]
cases = pytest.mark.parametrize(('kind', 'spec', 'mesh'), CASES, ids=[f'{k}-{s.tuning}-{m}' for k, s, m in CASES])
meshes = pytest.mark.parametrize('mesh', MESHES)


def declared(kind, state, partitioner):
    """The shardings of a state, as the loops declare them."""
    _, axes = partitioning.abstract_params(NETWORK)
    if kind == 'policy':
        policy, value = (partitioner.state(x, axes, TX) for x in (state.policy, state.value))
        return types.PolicyState(policy, partitioner.sharding(), value)
    return partitioner.state(state, axes, TX)


def place_base(partitioner):
    return jax.device_put(tiny.base(), partitioner.tree(partitioning.abstract_params(NETWORK)[1]))


def five_steps(step, base, state, batch):
    metrics = []
    for _ in range(5):
        state, now = step(base, state, batch, KEY)
        metrics.append(jax.device_get(now))
    return state, metrics


@functools.cache
def start(kind, spec):
    return jax.device_get(jax.jit(lambda: tiny.create(kind, spec, tiny.base(), TX))())


@functools.cache
def on_one(kind, spec):
    state, metrics = five_steps(jax.jit(tiny.stepper(kind, TX)), tiny.base(), start(kind, spec), BATCHES[kind])
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(state))
    return jax.device_get(state), metrics


@dataclasses.dataclass
class Eight:
    """Five steps on a mesh: what went in, what came out, and what was declared of it."""

    base: object
    before: object
    after: object
    metrics: list
    shardings: object
    memory: object


@functools.cache
def on_eight(kind, spec, mesh):
    partitioner = MESHES[mesh]
    with partitioner.scope():
        base, batch = place_base(partitioner), partitioner.batch(BATCHES[kind])
        shardings = declared(kind, start(kind, spec), partitioner)
        before = jax.device_put(start(kind, spec), shardings)
        step = jax.jit(tiny.stepper(kind, TX), donate_argnums=1, out_shardings=(shardings, None))
        step = step.lower(base, before, batch, KEY).compile()
        after, metrics = five_steps(step, base, before, batch)
    return Eight(base, before, after, metrics, shardings, step.memory_analysis())


def test_there_are_eight_devices():
    assert jax.device_count() == 8
    assert {name: dict(p.mesh.shape) for name, p in MESHES.items()} == {
        '8x1': {'replica': 1, 'data': 8, 'model': 1},
        '4x2': {'replica': 1, 'data': 4, 'model': 2},
        '2x4': {'replica': 1, 'data': 2, 'model': 4},
        'fsdp': {'replica': 1, 'data': 8, 'model': 1},
        'all': {'replica': 2, 'data': 2, 'model': 2},
    }  # fmt: skip


@cases
def test_eight_devices_equal_one(kind, spec, mesh):
    one, one_metrics = on_one(kind, spec)
    eight = on_eight(kind, spec, mesh)
    for name in one_metrics[0]:
        want = [m[name] for m in one_metrics]
        np.testing.assert_allclose([m[name] for m in eight.metrics], want, rtol=1e-4, atol=1e-5, err_msg=name)
    tiny.assert_close(jax.device_get(tiny.adapters(eight.after)), tiny.adapters(one), atol=1e-4)
    moved = jax.tree.map(lambda x, y: np.abs(x - y).max(), tiny.adapters(one), tiny.adapters(start(kind, spec)))
    assert min(jax.tree.leaves(moved)) > 1e-2


@cases
def test_the_state_lies_as_declared(kind, spec, mesh):
    run = on_eight(kind, spec, mesh)
    where = jax.tree.map(lambda x, want: x.sharding.is_equivalent_to(want, x.ndim), run.after, run.shardings)
    assert all(jax.tree.leaves(where))
    split = [x for x in jax.tree.leaves(tiny.adapters(run.after)) if not x.is_fully_replicated]
    assert bool(split) == (mesh != '8x1')


@cases
def test_the_state_is_donated_and_the_base_is_not(kind, spec, mesh):
    """XLA says so itself: what comes out takes the place of what went in."""
    run = on_eight(kind, spec, mesh)
    assert all(x.is_deleted() for x in jax.tree.leaves(tiny.adapters(run.before)))
    assert tiny.same(run.base, tiny.base())
    leaves = zip(*map(jax.tree.leaves, (tiny.adapters(run.after), tiny.adapters(run.shardings))))
    assert run.memory.alias_size_in_bytes >= sum(4 * np.prod(where.shard_shape(x.shape)) for x, where in leaves)


@pytest.mark.parametrize('mesh', ['8x1', '4x2', 'fsdp'])
def test_a_batch_without_padding_equals_and_no_token_moves(mesh):
    one, one_metrics = on_one('policy', LORA)
    partitioner, batch = MESHES[mesh], BATCHES['policy']
    programs = []
    with partitioner.scope():
        base = place_base(partitioner)
        shardings = declared('policy', start('policy', LORA), partitioner)
        before = jax.device_put(start('policy', LORA), shardings)
        for each in (batch, tiny.without_padding(batch, partitioner.data_parallel_size)):
            step = jax.jit(tiny.stepper('policy', TX), out_shardings=(shardings, None))
            programs.append(step.lower(base, before, partitioner.batch(each), KEY).compile())
        assert each.fill is not None
        after, metrics = five_steps(programs[1], base, before, partitioner.batch(each))
    for name in one_metrics[0]:
        want = [m[name] for m in one_metrics]
        np.testing.assert_allclose([m[name] for m in metrics], want, rtol=1e-4, atol=1e-5, err_msg=name)
    tiny.assert_close(jax.device_get(tiny.adapters(after)), tiny.adapters(one), atol=1e-4)
    moves = r'= f32\S+ (?:all-gather|all-to-all|collective-permute)\('  # of parameters and states, not of token ids
    padded, without = (len(re.findall(moves, program.as_text())) for program in programs)
    assert without == padded and (padded > 0) == (mesh == 'fsdp')


# The rollout.


def roll(base, adapter, prompts, scores):
    sampling = dataclasses.replace(SAMPLING, num_samples=scores.shape[1])
    drawn = sample(NETWORK, lora.bind(base, adapter), prompts, KEY, EOS, sampling)
    return drawn, experience(
        NETWORK, Objective(sampling=sampling), policy=(base, adapter), anchor=(base, None), rollout=drawn,
        scores=scores, beta=jnp.float32(0.1), eos_ids=EOS,
    )  # fmt: skip


def rollout_inputs(K):
    adapter = tiny.adapter(LORA, tiny.base(), head=False)
    return adapter, tiny.prompts(BATCHES['sft']), np.random.default_rng(0).standard_normal((B, K)).astype(np.float32)


@functools.cache
def rollout_on_one(K):
    return jax.device_get(jax.jit(roll)(tiny.base(), *rollout_inputs(K)))


def placed_rollout_inputs(partitioner, K):
    base, (adapter, prompts, scores) = place_base(partitioner), rollout_inputs(K)
    axes = partitioning.adapter_axes(adapter, partitioning.abstract_params(NETWORK)[1])
    adapter = jax.device_put(adapter, partitioner.tree(axes))
    return base, adapter, partitioner.batch(prompts), partitioner.batch(scores)


@pytest.mark.parametrize(('mesh', 'K'), [*((mesh, K) for mesh in MESHES), ('fsdp', 1), ('all', 1)])
def test_samples_and_their_experience_equal(mesh, K):
    """With one response a prompt the tokens of a turn are few enough to go to FSDP's kernels."""
    want, (want_experience, want_metrics) = rollout_on_one(K)
    partitioner = MESHES[mesh]
    with partitioner.scope():
        got, (judged, metrics) = jax.jit(roll)(*placed_rollout_inputs(partitioner, K))
    np.testing.assert_array_equal(got.targets, want.targets)
    np.testing.assert_array_equal(got.targets_mask, want.targets_mask)
    assert len(np.unique(want.targets[want.targets_mask])) > 10
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-5)
    np.testing.assert_allclose(judged.rewards, want_experience.rewards, atol=1e-4)
    tiny.assert_close(jax.device_get(metrics), want_metrics, atol=1e-4)


@meshes
def test_rollouts_and_the_samplers_cache_lie_split(mesh):
    """As the run compiles them: rows over data, key/value heads over model where they divide."""
    on = MESHES[mesh]
    with on.scope():
        base, adapter, prompts, scores = placed_rollout_inputs(on, K)
        tuning = Tuning(LORA, TX)
        learner = make_learner(
            network=NETWORK, objective=Objective(sampling=SAMPLING, value=tuning), tuning=tuning, eos_ids=EOS,
            partitioner=on,
        )  # fmt: skip
        drawn = learner.sample(base, adapter, prompts, KEY, SAMPLING)
        judged, _ = learner.experience(
            policy=(base, adapter), anchor=(base, None), rollout=drawn, scores=scores, beta=0.1
        )
        read = lambda *x: NETWORK.apply(lora.bind(base, adapter), *x, K, 5, method='prefill')[1]  # noqa: E731
        cache = jax.jit(read)(prompts.inputs, prompts.inputs_mask)
    for x in jax.tree.leaves((drawn, judged)):
        assert x.sharding.shard_shape(x.shape) == (B // on.data_parallel_size, *x.shape[1:])
    N, model = NETWORK.config.num_kv_heads, on.mesh.shape['model']
    for x in (*cache.prompt, *cache.responses):
        L, rows, *rest, _, S, E = x.shape
        want = (L, rows // on.data_parallel_size, *rest, N // model if N % model == 0 else N, S, E)
        assert x.sharding.shard_shape(x.shape) == want


@pytest.mark.parametrize('K', [1, K])
def test_under_fsdp_few_tokens_go_to_the_kernels_and_many_let_them_come(K):
    """The sampler's turns gather no kernel where a turn has at most D / 4 tokens."""
    partitioner = MESHES['fsdp']
    with partitioner.scope():
        base, adapter, prompts, _ = placed_rollout_inputs(partitioner, K)
        sampling = dataclasses.replace(SAMPLING, num_samples=K)
        draw = jax.jit(lambda *x: sample(NETWORK, lora.bind(*x[:2]), x[2], KEY, EOS, sampling))
        text = draw.lower(base, adapter, prompts).compile().as_text()
    gathers = [line for line in text.splitlines() if ' all-gather(' in line]
    turns = [line for line in gathers if re.search(r'Decoder\.(decode|logits)', line)]
    moved = [{int(n) for n in re.search(r'\[([\d,]+)\]', line)[1].split(',')} - {1} for line in turns]
    gathered = [shape for shape in moved if len(shape) == 2 and D in shape and B not in shape]
    assert bool(gathered) == (K > 1), gathered


# What surrounds the steps.


@meshes
def test_the_base_is_the_same_on_every_mesh(mesh):
    """Random weights, and their fingerprint, do not depend on the layout; nor does that of any other tree."""
    partitioner = MESHES[mesh]
    with partitioner.scope():
        base = load_base(BaseConfig(NETWORK), partitioner, 0)
        placed = place_base(partitioner)
    one = jax.tree.map(np.array, base.params)
    assert base.fingerprint == fingerprint(one)
    assert fingerprint(placed) == fingerprint(tiny.base())
    assert base.fingerprint == load_base(BaseConfig(NETWORK), MESHES['8x1'], 0).fingerprint
    split = base.params['decoder']['layers']['mlp']['wo']['kernel']
    width = D // partitioner.mesh.shape['data'] if partitioner.logical_axis_rules == FSDP else D
    assert split.sharding.shard_shape(split.shape) == (2, 48 // partitioner.num_partitions, width)


def _saved(state):
    return {'policy': state.policy, 'value': state.value, 'beta': state.beta}


@pytest.mark.parametrize('spec', [LORA, FULL], ids=['lora', 'full'])
def test_a_checkpoint_of_one_mesh_is_read_on_another(tmp_path, spec):
    run, after = Checkpoints(str(tmp_path)), on_eight('policy', spec, '2x4').after
    about = {'phase': 'policy', 'base': {}, 'adapters': {'value': {'scale': after.value.adapter.scale, 'dropout': 0.0}}}
    run.save(5, _saved(after), about)
    run.close()
    shardings = declared('policy', start('policy', spec), MESHES['4x2'])
    like = jax.device_put(jax.tree.map(np.zeros_like, start('policy', spec)), shardings)
    run = Checkpoints(str(tmp_path))
    back = types.PolicyState(**run.restore(5, _saved(like)))
    assert tiny.same(run.restore_adapters(5)['value'], after.value.adapter)
    run.close()
    assert tiny.same(back, after)
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(*map(jax.tree.leaves, (back, shardings))))


def test_a_batch_must_divide_over_the_data_axis():
    MESHES['4x2'].check_batch('BATCH_SIZE', 12)
    with pytest.raises(UserError, match='BATCH_SIZE = 12 is not divisible by the data-parallel size 8'):
        MESHES['8x1'].check_batch('BATCH_SIZE', 12)
    with pytest.raises(UserError, match='num_partitions = 3 does not divide the 8 devices'):
        _ = dataclasses.replace(MESHES['8x1'], num_partitions=3).mesh


@meshes
def test_a_batch_is_split_over_data_alone(mesh):
    rows = MESHES[mesh].batch(np.arange(B))
    assert rows.sharding.shard_shape((B,)) == (MESHES[mesh].num_partitions,)


def test_under_fsdp_the_rows_of_the_embedding_move_and_not_the_table():
    """A step reads all of the table's columns for few of its rows; only a tied model's logits read it whole."""
    partitioner = MESHES['fsdp']
    with partitioner.scope():
        base, batch = place_base(partitioner), partitioner.batch(BATCHES['sft'])
        state = jax.device_put(start('sft', LORA), declared('sft', start('sft', LORA), partitioner))
        text = jax.jit(tiny.stepper('sft', TX)).lower(base, state, batch, KEY).compile().as_text()
    table, gathers = f'[{tiny.V},{D}]', [line for line in text.splitlines() if ' all-gather(' in line]
    reads = [line for line in gathers if table in line.split(' all-gather(')[0]]
    assert reads and all('token_embedder.attend' in line for line in reads), reads
    assert len(reads) <= 2, reads  # forward, and once more where the backward pass makes the logits again


@meshes
def test_the_fused_kernel_on_a_mesh(mesh):
    """Each chip attends within its own rows and heads: values and gradients as on one device."""
    rng, on, K = np.random.default_rng(0), MESHES[mesh], 2
    query, key, value = (rng.standard_normal((B, 20, heads, 8)).astype(np.float32) for heads in (8, 4, 4))
    mask = np.arange(12) < rng.integers(1, 13, (B, 1))
    real = np.concatenate([mask, np.ones((B, 8), bool)], axis=1)[..., None]

    def attend(*qkv):
        out = flash.attend(*qkv, mask, K, interpret=True)
        return (jnp.where(real, out, 0) ** 2).sum(), jnp.where(real, out, 0)

    run = jax.jit(jax.value_and_grad(attend, argnums=(0, 1, 2), has_aux=True))
    (_, want), gradients = run(query, key, value)
    with on.scope():
        placed = [jax.device_put(x, on.sharding('batch', 'length', 'kv_heads')) for x in (query, key, value)]
        (_, got), found = run(*placed)
    assert got.sharding.shard_shape(got.shape)[0] == B // on.data_parallel_size
    np.testing.assert_allclose(got, want, atol=1e-5)
    tiny.assert_close(found, gradients, atol=1e-4, rtol=1e-4)


def test_a_few_prompts_are_answered_on_any_mesh(tmp_path, capsys):
    """As `perl_jax sample` does it, of a run that takes its prompts in parts."""
    from perl_jax.tasks import toy  # noqa: F401 (registers them)

    network = Decoder(dataclasses.replace(NETWORK.config, vocab_size=384))  # the toy's bytes
    base = BaseConfig(network)
    frozen = load_base(base, Partitioner(), 0)
    adapter, words = LORA.init(KEY, frozen.params), {'vocabulary': 'task:toy_prompts'}
    given = {'base': frozen.name, 'base_parameters': 1, 'vocabulary': words, 'source': 'a test', 'config_text': ''}
    loop.write_finished_run(str(tmp_path), 'policy', 'policy', adapter, **given)
    prompts = DatasetConfig('toy_prompts', {'inputs': 64}, 8)
    sampling = dataclasses.replace(SAMPLING, num_microbatches=2)
    infer.sample_policy(str(tmp_path), base, prompts, sampling=sampling, num=3, partitioner=MESHES['all'])
    assert capsys.readouterr().out.count('"tokens"') == 3
