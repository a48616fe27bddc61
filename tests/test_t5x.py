"""T5X's checkpoints: those that T5X wrote, with the logits its own network gave, and our own in both of its formats."""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
import tiny
from flax import serialization, traverse_util
from test_t5 import NETWORK

from perl_jax.errors import UserError
from perl_jax.interop import t5x
from perl_jax.models.decoder import Decoder
from perl_jax.models.t5 import T5, T5Config
from perl_jax.parallel import leaves
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs.base import BaseConfig

DATA = pathlib.Path(os.environ.get('PERL_JAX_DATA', pathlib.Path(__file__).parents[2] / 'shared/data')) / 't5x_tiny'
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason='needs t5x_tiny/ (checkpoints that T5X wrote) in ../shared/data or PERL_JAX_DATA'
)
formats = pytest.mark.parametrize('format', ['legacy', 'orbax'])
ONE = Partitioner()


def write_legacy(folder, params, step, old=False):
    """A checkpoint in T5X's older format, with the odd leaf inside the index; `old`: before TensorStore 0.1.14."""
    path, flat = folder / f'checkpoint_{step}', tiny.apart(params)
    for i, (name, x) in enumerate(flat.items()):
        if i % 5 == 0:
            flat[name] = np.asarray(x)
            continue
        inside = f'target.{name.replace("/", ".")}/'
        spec = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{path}/{inside}'}}
        gzip = {'compressor': {'id': 'gzip', 'level': 1}}
        made = ts.open(spec | {'metadata': gzip}, create=True, dtype=x.dtype.name, shape=x.shape).result()
        made.write(np.asarray(x)).result()
        there = {'path': inside, 'kvstore': {'driver': 'gcs', 'bucket': 't5x-dummy-bucket'}}
        if not old:
            there = {'kvstore': {'driver': 'file', 'path': inside}}
        flat[name] = {'driver': 'zarr', 'dtype': x.dtype.name, **there}
    target = traverse_util.unflatten_dict(flat, sep='/')
    state = {'step': step, 'param_states': {'decoder': {'m': np.zeros(3)}}}
    index = {'version': 3, 'optimizer': {'target': target, 'state': state}}
    (path / 'checkpoint').write_bytes(serialization.msgpack_serialize(index))
    return path


def write(format, folder, params, step=20):
    if format == 'legacy':
        return write_legacy(folder, params, step)
    t5x.save(str(folder), params, step)
    return folder / f'checkpoint_{step}'


@needs_data
@formats
def test_the_logits_of_t5xs_own_network(format):
    about = json.loads((DATA / 'config.json').read_text())[format]
    assert about.pop('mlp_activations') == ['gelu', 'linear'] and about.pop('dropout_rate') == 0
    network, reference = T5(T5Config(**about)), np.load(DATA / f'{format}_reference.npz')
    with ONE.scope():
        base = bases.load(BaseConfig(network, str(DATA / format)), ONE, 0)
    inputs, targets = reference['encoder_input_tokens'], reference['decoder_target_tokens']
    hidden = jax.jit(network.apply)({'params': base.params}, inputs, inputs > 0, targets[:, None])
    got = network.apply({'params': base.params}, hidden[:, 0, :-1], method='logits')
    assert (targets == 0).any() and (inputs == 0).any() and np.abs(reference['logits']).max() > 1
    np.testing.assert_allclose(got[targets > 0], reference['logits'][targets > 0], atol=1e-5)


@needs_data
def test_what_we_write_has_the_structure_of_what_t5x_writes(tmp_path):
    path, theirs = tmp_path / 'checkpoint_20', DATA / 'orbax/checkpoint_20'
    t5x.save(str(tmp_path), jax.tree.map(jnp.asarray, t5x.load(str(theirs))), 20)
    names = lambda path: {str(f.relative_to(path)) for f in path.rglob('*') if f.parent.name != 'd'}  # noqa: E731
    assert names(path) == names(theirs)
    ours, wanted = (json.loads((p / 'state/_METADATA').read_text()) for p in (path, theirs))
    tree, whole = ours.pop('tree_metadata'), wanted.pop('tree_metadata')
    assert ours == wanted
    assert tree == {name: leaf for name, leaf in whole.items() if 'param_states' not in name}
    assert len(tree) == 53


@needs_data
@formats
def test_what_t5x_wrote_goes_round_bit_for_bit(tmp_path, format):
    params = t5x.load(str(DATA / format))
    t5x.save(str(tmp_path), params, 7)
    assert tiny.same(t5x.load(str(tmp_path)), params)


@formats
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trip_bit_for_bit(tmp_path, format, dtype):
    params = jax.tree.map(lambda x: np.asarray(x, dtype), tiny.base(NETWORK))
    scale = params['encoder']['encoder_norm']
    scale['scale'] = np.zeros_like(scale['scale'])  # a chunk that a writer might leave out
    got = t5x.load(str(write(format, tmp_path, params)), dtype)
    assert jax.tree.structure(got) == jax.tree.structure(params)
    assert tiny.same(got, params)


@formats
def test_more_than_ten_layers_keep_their_order(tmp_path, format):
    params = {'encoder': {'layers': {'mlp': {'wo': {'kernel': np.arange(12.0, dtype='float32')[:, None, None]}}}}}
    assert tiny.same(t5x.load(str(write(format, tmp_path, params))), params)


def test_legacy_of_old_tensorstore(tmp_path):
    params = tiny.base(NETWORK)
    assert tiny.same(t5x.load(str(write_legacy(tmp_path, params, 5, old=True))), params)


@pytest.mark.filterwarnings('ignore:Sharding info not provided')
def test_orbax_itself_reads_the_step(tmp_path):
    import orbax.checkpoint as ocp

    path = write('orbax', tmp_path, tiny.base(NETWORK), 1234)
    state = ocp.PyTreeCheckpointer().restore(path / 'state')
    assert state.keys() == {'target', 'state'} and state['state'].keys() == {'step'}
    assert state['state']['step'] == 1234 and state['state']['step'].dtype == jnp.int32


def test_the_latest_of_several(tmp_path):
    for step, format in (9, 'legacy'), (10, 'orbax'):
        write(format, tmp_path, jax.tree.map(lambda x, n=step: 0 * x + n, tiny.base(NETWORK)), step)
    (tmp_path / 'checkpoint_11.tmp-1').mkdir()
    (tmp_path / 'checkpoint_11.tmp-1' / 'checkpoint').write_text('half')
    assert t5x.find(str(tmp_path)).endswith('checkpoint_10')
    assert jax.tree.leaves(t5x.load(str(tmp_path)))[0].min() == 10


@formats
def test_it_is_a_base(tmp_path, format):
    path = str(write(format, tmp_path, tiny.base(NETWORK)))
    with ONE.scope():
        base = bases.load(BaseConfig(NETWORK, path, 'bfloat16'), ONE, 0)
        assert tiny.same(base.params, jax.tree.map(lambda x: x.astype('bfloat16'), tiny.base(NETWORK)))
        assert bases.load_recorded(NETWORK, base.name, ONE).fingerprint == base.fingerprint
        with pytest.raises(UserError, match='decoder_norm|layers'):
            bases.load(BaseConfig(Decoder(tiny.CONFIG), path), ONE, 0)


def only_line(raised):
    assert '\n' not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize('what', ['nothing', 'empty', 'file'])
def test_no_checkpoint(tmp_path, what):
    path = tmp_path / 'it'
    if what != 'nothing':
        path.mkdir() if what == 'empty' else path.write_text('hello')
    with pytest.raises(UserError, match=f"'{path}' is no T5X checkpoint") as raised:
        t5x.load(str(path))
    assert 'state/manifest.ocdbt' in only_line(raised)
    with pytest.raises(UserError, match='no Hugging Face or T5X checkpoint|has no checkpoints/') as raised:
        bases.load(BaseConfig(NETWORK, str(path)), ONE, 0)
    assert 'INITIAL_CHECKPOINT_PATH' in only_line(raised)


@pytest.mark.parametrize(
    ('format', 'file', 'named'),
    [
        ('legacy', 'checkpoint', 'its index'),
        ('legacy', 'target.decoder.layers_1.mlp.wo.kernel/0.0', 'decoder/layers_1/mlp/wo/kernel'),
        ('legacy', 'target.decoder.layers_1.mlp.wo.kernel/.zarray', 'decoder/layers_1/mlp/wo/kernel'),
        ('orbax', 'state/manifest.ocdbt', 'its index'),
        ('orbax', 'state/ocdbt.process_0/d/*', ''),
    ],
)
@pytest.mark.parametrize('harm', ['truncated', 'missing'])
def test_damage(tmp_path, format, file, named, harm):
    path = write(format, tmp_path, tiny.base(NETWORK))
    largest = max(path.glob(file), key=lambda f: f.stat().st_size)
    if harm == 'truncated':
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        largest.unlink()
    with pytest.raises(UserError) as raised:
        t5x.load(str(path))
    message = only_line(raised)
    assert str(path) in message
    gone = harm == 'missing' and file in ('checkpoint', 'state/manifest.ocdbt')
    assert ('is no T5X checkpoint' in message) if gone else (f'{named} is missing or truncated' in message)


def test_metadata_of_deep_brackets(tmp_path):
    """TensorStore dies of them."""
    path = write('legacy', tmp_path, tiny.base(NETWORK))
    metadata = path / 'target.decoder.layers_1.mlp.wo.kernel/.zarray'
    metadata.write_text(metadata.read_text().replace('"zarr_format":2', f'"zarr_format":{"[" * 10**5}{"]" * 10**5}'))
    with pytest.raises(UserError, match='decoder/layers_1/mlp/wo/kernel is missing or truncated'):
        t5x.load(str(path))


def test_stacked_layers(tmp_path):
    kernel = np.zeros((8, 2, 12), np.float32)
    t5x.save(str(tmp_path), {'decoder': {'decoder': {'mlp': {'wo': {'kernel': kernel}}}}}, 1)
    with pytest.raises(
        UserError, match=r'decoder/decoder/mlp/wo/kernel has shape \[8, 2, 12\], as scalable_t5'
    ) as raised:
        t5x.load(str(tmp_path))
    only_line(raised)


def test_another_kind_of_orbax_checkpoint(tmp_path):
    import orbax.checkpoint as ocp

    ocp.PyTreeCheckpointer().save(tmp_path / 'state', {'adapter': np.zeros(3)})
    with pytest.raises(UserError, match='has no parameters: nothing in it is called target') as raised:
        t5x.load(str(tmp_path))
    only_line(raised)


def test_a_step_is_written_once(tmp_path):
    write('orbax', tmp_path, {'a': np.zeros(3)}, 4)
    with pytest.raises(UserError, match='has a checkpoint_4 already'):
        t5x.save(str(tmp_path), {'a': np.zeros(3)}, 4)


def test_buckets_have_their_own_driver():
    """No more than that: there is no bucket to read here."""
    spec = t5x._kvstore('gs://t5-data/pretrained_models/t5x/t5_1_1_small/checkpoint_1000000/', 'state/')
    inside = 'pretrained_models/t5x/t5_1_1_small/checkpoint_1000000/state/'
    assert spec == {'driver': 'gcs', 'bucket': 't5-data', 'path': inside}
    assert ts.KvStore.open(spec).result().path == inside


@formats
def test_any_slice_is_that_of_the_whole(tmp_path, format):
    path = str(write(format, tmp_path, tiny.base(NETWORK)))
    for leaf, want in zip(*map(jax.tree.leaves, (t5x.leaves(path), t5x.load(path))), strict=True):
        for part in (slice(0, 1), slice(1, None)):
            index = leaves.explicit_index((part,) * want.ndim, want.shape)
            got = leaves.read(leaf, index, jnp.bfloat16)
            np.testing.assert_array_equal(got, want[index].astype(jnp.bfloat16))
