"""What `perl_jax plan` reads from the TPU's compiler, by hand and by the compiler itself."""

import collections
import json
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy_runs import perl

from perl_jax.errors import UserError
from perl_jax.kernels import flash
from perl_jax.parallel import topology
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.tools import plan as planning
from perl_jax.tools.plan import flops, hlo
from perl_jax.tools.plan.compile import KERNELS, report, size
from perl_jax.tools.plan.programs import Program

MESH = [('replica', 1), ('data', 2), ('model', 4)]

# What XLA prints, cut down: a loop of 3 turns with a matrix product and a gather that is spread over two fusions; a
# loop that the data ends; a sum over all chips.
TEXT = """\
HloModule jit_step

%fused.1 (p: bf16[4,8]) -> bf16[8,8] {
  %all-gather.1 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%fused.2 (p: bf16[4,8]) -> bf16[8,8] {
  %all-gather.2 = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}

%cond (p: (s32[])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  ROOT %compare.1 = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %fusion.1 = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%fused.1, backend_config={"estimated_cycles":"100"}
  %fusion.2 = bf16[8,8]{1,0} fusion(%x), kind=kOutput, calls=%fused.2, backend_config={"estimated_cycles":"50"}
}

%until (p: (s32[])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(128)
  ROOT %and.1 = pred[]{:T(512)} and(%a, %b)
}

%draw (p: (s32[])) -> (s32[]) {
  %add.1 = f32[8]{0} add(%x, %y), backend_config={"estimated_cycles":"10"}
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %while.1 = (s32[]) while(%t), condition=%cond, body=%body
  %while.2 = (s32[]) while(%t), condition=%until, body=%draw
  %all-reduce.1 = (f32[16]{0}, f32[]) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}
  %permute = (bf16[4]{0}, bf16[4]{0}, u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %scatter = f32[2]{0} reduce-scatter(%x), channel_id=3, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
}
"""


def test_a_program_is_added_up_with_its_loops():
    cost = hlo.cost(TEXT, MESH, max_iterations=5)
    assert cost.cycles == 3 * (100 + 50) + 5 * 10
    assert cost.collectives == collections.Counter({
        ('all-gather', ('data',)): 3 * 64,  # half of 128 bytes arrives, three times, however it is spread
        ('all-reduce', ('data', 'model')): 2 * 7 / 8 * (64 + 4),
        ('collective-permute', ('model',)): 8,
        ('reduce-scatter', ('model',)): 3 * 8,
    })  # fmt: skip


def test_flops_count_products_as_often_as_they_are_made():
    def f(x, w):
        x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, w)  # 3 of 2 * 4 * 8 * 8
        return jax.lax.while_loop(lambda s: s[1] < s[0].sum(), lambda s: (s[0] @ w[0], s[1] + 1), (x, 0))

    jaxpr = jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.ones((3, 8, 8))).jaxpr
    assert flops.count(jaxpr, max_iterations=1).total == 4 * 2 * 4 * 8 * 8
    assert flops.count(jaxpr, max_iterations=10).total == 13 * 2 * 4 * 8 * 8
    gradient = jax.make_jaxpr(jax.grad(lambda x, w: (x @ w).sum(), argnums=(0, 1)))(jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert flops.count(gradient.jaxpr, 1) == (3 * 2 * 4 * 8 * 8, 0)


def product(name='v5e:2x2', n=4096):
    """x @ w with x split over data, on a topology."""
    on = Partitioner(topology=name, devices=topology.devices(name))
    at = lambda *axes: NamedSharding(on.mesh, PartitionSpec(*axes))  # noqa: E731
    x = jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=at(('replica', 'data')))
    w = jax.ShapeDtypeStruct((n, n), jnp.bfloat16, sharding=at())
    alive = {'base': w, 'adapters': (), 'optimizer': (), 'data': x}
    return Program('product', jax.jit(lambda x, w: x @ w), (x, w), alive), on


@pytest.mark.parametrize('name', ['v5e:2x2', 'v4:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_a_product_on_each_chip(name):
    n = 4096
    program, on = product(name)
    found, devices = report(program, on), 8 if name == 'tpu7x:2x2x1' else 4  # two in each chip of tpu7x
    assert found.flops == 2 * n**3 / devices
    assert (found.base, found.adapters, found.data) == (2 * n * n, 0, 2 * n * n // devices)
    assert found.fits and found.peak == sum((found.base, found.adapters, found.data, found.temporaries))
    assert found.temporaries >= 2 * n * n // devices  # what comes out
    assert 0.4 < found.utilisation < 1
    assert not found.collectives


def test_attention_on_a_tpu_is_one_kernel():
    """Its products count for every block of every chip, at a share of the peak; the scores lie nowhere."""
    B, T, H, N, E = 8, 256, 4, 2, 128
    on = Partitioner(2, topology='v5e:2x2', devices=topology.devices('v5e:2x2'))
    like = lambda heads: jax.ShapeDtypeStruct((B, T, heads, E), jnp.bfloat16, sharding=on.sharding('batch'))  # noqa: E731
    mask = jax.ShapeDtypeStruct((B, T), jnp.bool_, sharding=on.sharding('batch'))

    def attend(query, key, value, mask):
        assert flash.usable(query, key) and not flash.usable(query[:3], key) and not flash.usable(query, key[:, :, :1])
        return flash.attend(query, key, value, mask, 0)

    alive = {'base': (), 'adapters': (), 'optimizer': (), 'data': mask}
    found = report(Program('attention', jax.jit(attend), (like(H), like(N), like(N), mask), alive), on)
    assert found.flops == B * H * 2 * 2 * T * T * E / 4
    assert found.cycles > found.flops / (KERNELS * topology.CHIPS['v5e'].peak_flops) * topology.CHIPS['v5e'].clock
    assert found.temporaries < B * H * T * T * 4 / 4


def test_an_array_that_two_roles_share_is_there_once():
    program, _ = product()
    w = program.resident['base']
    assert size([w, {'again': w}]) == size(w) == 2 * 4096**2


def test_what_does_not_fit_is_an_answer():
    program, on = product(n=2**17)
    found = report(program, on)
    assert found.fits is False and found.peak is None and found.needs.endswith('GiB')


TOY = ('plan', '--gin_file=recipes/toy_policy.gin', '--gin.TRAIN_STEPS=6')


def plan(*flags):
    result = perl(*TOY, *flags)
    assert result.code == 0, result.err
    return result


def test_a_policy_is_planned_without_a_device_or_a_weight():
    (found,) = json.loads(plan('--topology=v5e:2x2', '--json', '--gin_file=algorithms/rloo.gin').out)
    assert [one['name'] for one in found['programs']] == ['sample', 'score', 'experience', 'policy step']
    assert found['fits'] and found['mesh'] == {'replica': 1, 'data': 4, 'model': 1}
    sample, _, _, step = found['programs']
    assert sample['cache'] > 0 and sample['seconds'] > 0 and 'all-reduce data' in step['collectives']
    assert found['seconds'] == pytest.approx(sum(one['seconds'] for one in found['programs']))
    # LoRA: one base for all, and of the policy and the reward an adapter each.
    assert {one['base'] for one in found['programs']} == {sample['base']}
    assert step['adapters'] < 0.5 * step['base']


def test_full_tuning_stands_beside_it():
    flags = '--gin_file=tuning/lora.gin', '--topology=v5e:2x2', '--compare=full'
    result = perl('plan', '--gin_file=recipes/toy_sft.gin', *flags)
    assert result.code == 0, result.err
    lora, full = (line for line in result.out.splitlines() if line.startswith('  sft step  '))
    assert lora != full
    *_, header, mine, theirs = result.out.splitlines()
    assert header.split()[:2] == ['topology', 'batch'] and mine.split()[:2] == ['as', 'configured']
    assert theirs.split()[:2] == ['full', 'v5e:2x2'] and '100%' in theirs and theirs.endswith('1.00x')


@pytest.mark.parametrize(('flags', 'said'), [
    (['--topology=v5e:3x3'], "topology 'v5e:3x3': a host of v5e has 2x2 chips"),
    (['--topology=v5e:4x4', '--gin.BATCH_SIZE=8'], 'minibatches = 8 is not divisible by the data-parallel size 16'),
    (['--compare=lorra'], 'tuning/lorra.gin'),
    (['--fit=memory'], "argument --fit: invalid choice: 'memory'"),
])  # fmt: skip
def test_errors(flags, said):
    assert said in perl(*TOY, *flags).line


def test_the_largest_batch(monkeypatch):
    """Without a compiler: a batch fits up to so many units."""
    tried, Report = [], collections.namedtuple('Report', 'fits')

    def compile_plan(planner, topology, units):
        tried.append(units)
        return types.SimpleNamespace(batch_size=8 * units), [Report(units <= planner)]

    monkeypatch.setattr(planning, 'compile_plan', compile_plan)
    assert planning.largest_batch(5, 'v5e:4x4')[0].batch_size == 40
    assert tried == [1, 2, 4, 8, 6, 5]
    with pytest.raises(UserError, match='not even BATCH_SIZE = 8 fits on v5e:4x4'):
        planning.largest_batch(0, 'v5e:4x4')
