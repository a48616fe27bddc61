"""Which axis of what lies where. The devices themselves are in multidevice/test_mesh.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import linen as nn
from flax import traverse_util
from jax.sharding import PartitionSpec

from perl_jax.errors import UserError
from perl_jax.models import lora
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.optim import train_state
from perl_jax.parallel import partitioning, topology
from perl_jax.parallel.partitioning import Partitioner

KEY = jax.random.key(0)
ATTENTION, MLP = 'decoder/layers/self_attention', 'decoder/layers/mlp'
ADAFACTOR = optax.adafactor(1e-2, min_dim_size_to_factor=8)


def spec(sharding):
    """A sharding as a tuple without the Nones at its end."""
    names = list(sharding.spec)
    while names and names[-1] is None:
        names.pop()
    return tuple(names)


def specs(tree):
    return {path: spec(x) for path, x in traverse_util.flatten_dict(tree, sep='/').items()}


def state_shardings(adapter_spec, tx, head=(tiny.D, 1.0)):
    shapes, axes = partitioning.abstract_params(tiny.UNTIED)
    state = jax.eval_shape(lambda: train_state.create(KEY, tiny.base(tiny.UNTIED), adapter_spec, tx, head))
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda x: isinstance(x, tuple))
    return state, Partitioner().state(state, axes, tx)


def test_the_base_lies_as_t5x_has_it():
    _, axes = partitioning.abstract_params(tiny.UNTIED)
    assert specs(Partitioner().tree(axes)) == {
        'token_embedder/embedding': ('model',),
        'decoder/layers/pre_self_attention_layer_norm/scale': (),
        f'{ATTENTION}/query/kernel': (None, None, 'model'),
        f'{ATTENTION}/key/kernel': (None, None, 'model'),
        f'{ATTENTION}/value/kernel': (None, None, 'model'),
        f'{ATTENTION}/out/kernel': (None, 'model'),
        'decoder/layers/pre_mlp_layer_norm/scale': (),
        f'{MLP}/wi_0/kernel': (None, None, 'model'),
        f'{MLP}/wi_1/kernel': (None, None, 'model'),
        f'{MLP}/wo/kernel': (None, 'model'),
        'decoder/decoder_norm/scale': (),
        'decoder/logits_dense/kernel': (None, 'model'),
    }


def test_a_pair_lies_as_its_kernel_with_the_rank_whole():
    _, shardings = state_shardings(LoraSpec(targets=lora.ALL_LINEAR), optax.sgd(1.0))
    got = specs(shardings.adapter.lora)
    for layer in (f'{ATTENTION}/query', f'{ATTENTION}/key', f'{ATTENTION}/value', f'{MLP}/wi_0', f'{MLP}/wi_1'):
        assert (got.pop(f'{layer}/a'), got.pop(f'{layer}/b')) == ((), (None, None, 'model'))
    for layer in (f'{ATTENTION}/out', f'{MLP}/wo'):
        assert (got.pop(f'{layer}/a'), got.pop(f'{layer}/b')) == ((None, 'model'), ())
    assert not got
    assert spec(shardings.adapter.head['kernel']) == spec(shardings.step) == ()


def test_a_pair_of_an_unstacked_layer():
    adapter = lora.Adapter(lora={'logits_dense': {'a': 0, 'b': 0}})
    axes = partitioning.adapter_axes(adapter, {'logits_dense': {'kernel': ('embed', 'vocab')}})
    assert axes.lora == {'logits_dense': {'a': ('embed', 'lora_rank'), 'b': ('lora_rank', 'vocab')}}
    assert axes.params is None and axes.head is None


def test_full_tuning_lies_as_the_base():
    _, axes = partitioning.abstract_params(tiny.UNTIED)
    _, shardings = state_shardings(FullSpec(), optax.sgd(1.0))
    assert specs(shardings.adapter.params) == specs(Partitioner().tree(axes))


@pytest.mark.parametrize('adapter_spec', [LoraSpec(targets=lora.ALL_LINEAR), FullSpec()], ids=['lora', 'full'])
def test_moments_lie_as_their_parameters(adapter_spec):
    state, shardings = state_shardings(adapter_spec, optax.adam(1e-2))
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(shardings.opt_state)
    moments, parameters = shardings.opt_state[0], jax.tree.leaves(shardings.adapter)
    for tree in (moments.mu, moments.nu):
        assert [x.spec for x in jax.tree.leaves(tree)] == [x.spec for x in parameters]
    assert any(x.spec != PartitionSpec() for x in parameters)
    assert spec(moments.count) == ()


def test_factored_moments_are_copies():
    """Adafactor's rows and columns have other shapes than their parameter, so its layout is not theirs."""
    state, shardings = state_shardings(FullSpec(), ADAFACTOR)
    leaves = zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(shardings.opt_state), strict=True)
    assert all(len(where.spec) <= x.ndim for x, where in leaves)
    wo = lambda tree: tree.params['decoder']['layers']['mlp']['wo']['kernel']  # noqa: E731
    assert wo(state.opt_state[0].v_row).shape == (tiny.L, 32)
    assert spec(wo(shardings.opt_state[0].v_row)) == ()
    assert spec(wo(shardings.adapter)) == (None, 'model')


def test_rules_can_be_changed():
    rules = partitioning.standard_logical_axis_rules(additional_rules=[('layers', 'data')])
    _, axes = partitioning.abstract_params(tiny.NETWORK)
    got = specs(Partitioner(logical_axis_rules=rules).tree(axes))
    assert got[f'{ATTENTION}/query/kernel'] == ('data', None, 'model')


def test_fsdp_splits_parameters_over_data_and_activations_by_batch_alone():
    rules = partitioning.standard_logical_axis_rules(parameter_partitioning_dims=2)
    partitioner, (_, axes) = Partitioner(logical_axis_rules=rules), partitioning.abstract_params(tiny.UNTIED)
    got = specs(partitioner.tree(axes))
    assert got[f'{ATTENTION}/query/kernel'] == (None, 'data', 'model')
    assert got[f'{ATTENTION}/out/kernel'] == (None, 'model', 'data')
    assert got['token_embedder/embedding'] == ('model', 'data')
    assert spec(partitioner.sharding('batch', 'length', 'embed')) == (('replica', 'data'),)


def test_activations_between_layers_can_lie_on_model():
    rules = partitioning.standard_logical_axis_rules(2, 2)
    partitioner, (_, axes) = Partitioner(logical_axis_rules=rules), partitioning.abstract_params(tiny.UNTIED)
    assert spec(partitioner.sharding('batch', 'length', 'embed')) == (('replica', 'data'), None, 'model')
    assert specs(partitioner.tree(axes))[f'{MLP}/wi_0/kernel'] == (None, 'data', 'model')


def test_a_batch_is_split_over_data():
    placed = Partitioner().batch(tiny.responses())
    assert all(spec(x.sharding) == (('replica', 'data'),) for x in jax.tree.leaves(placed))
    assert tiny.same(placed, tiny.responses())


def test_partitions_must_divide_the_devices():
    with pytest.raises(UserError, match='num_partitions = 3 does not divide the .* devices'):
        _ = Partitioner(num_partitions=3).mesh


def test_the_mesh_is_replica_by_data_by_model():
    assert Partitioner().mesh.axis_names == ('replica', 'data', 'model')
    assert Partitioner().mesh.shape == {'replica': 1, 'data': jax.device_count(), 'model': 1}


def test_a_run_on_other_devices_than_its_layout_is_for_stops():
    with pytest.raises(UserError, match="'v5e:4x4' is 16 x TPU v5 lite, and this job has .* x cpu; use the mesh/ file"):
        _ = Partitioner(topology='v5e:4x4').mesh


def test_a_parameter_that_does_not_divide_is_named():
    devices = topology.devices('v5e:4x4')
    shapes, axes = partitioning.abstract_params(tiny.UNTIED)
    Partitioner(num_partitions=4, devices=devices).check_params(shapes, axes)
    with pytest.raises(UserError, match=r"/kernel: its axis '\w+' of \d+ does not divide over the 16 devices along"):
        Partitioner(num_partitions=16, devices=devices).check_params(shapes, axes)


def test_a_process_alone_has_every_row():
    partitioner = Partitioner()
    assert partitioner.rows(6).tolist() == [0, 1, 2, 3, 4, 5]
    batch = tiny.responses()
    assert tiny.same(partitioner.local(partitioner.batch(batch)), batch)
    assert tiny.same(partitioning.gather(partitioner.batch(batch)), batch)


def test_abstract_and_unbox():
    shapes, _ = partitioning.abstract_params(tiny.NETWORK)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(shapes))
    boxed = {'a': nn.LogicallyPartitioned(jnp.ones(2), ('embed',)), 'b': jnp.zeros(3)}
    assert tiny.same(partitioning.unbox(boxed), {'a': np.ones(2, np.float32), 'b': np.zeros(3, np.float32)})


def test_place():
    shardings = {'a': Partitioner().sharding('batch'), 'b': Partitioner().sharding()}
    placed = jax.device_put({'a': np.ones(8), 'b': np.zeros(3)}, shardings)
    assert {name: x.sharding for name, x in placed.items()} == shardings
