"""Where the frozen base comes from; GGUF files have tests of their own."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from perl_jax import types
from perl_jax.errors import UserError
from perl_jax.interop import hf
from perl_jax.models import lora
from perl_jax.models.decoder import Decoder
from perl_jax.models.description import describe
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs import finished
from perl_jax.runs.base import BaseConfig
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.runs.fingerprints import fingerprint

NETWORK, ONE = tiny.NETWORK, Partitioner()


@functools.cache
def random(seed, dtype='float32'):
    return load(seed=seed, dtype=dtype)


def load(path=None, seed=0, dtype='float32', network=NETWORK):
    with ONE.scope():
        return bases.load(BaseConfig(network, path, dtype), ONE, seed)


def sft_run(folder, base, spec, phase='sft', adapter=None, older=False):
    """What an SFT run on this base leaves behind; returns its adapter. An older one does not name its network."""
    adapter = adapter or tiny.adapter(spec, base.params, head=False)
    run = Checkpoints(str(folder))
    about = {'policy': {'scale': adapter.scale, 'dropout': adapter.dropout}}
    state = types.TrainState(jnp.int32(1), adapter, ())
    name = {key: value for key, value in base.name.items() if key != 'network' or not older}
    run.save(1, {'policy': state}, {'phase': phase, 'base': name, 'adapters': about})
    run.close()
    return adapter


def test_random_weights_follow_the_seed():
    one, two, other = random(3), load(seed=3), random(4)
    assert tiny.same(one.params, two.params)
    assert one.name == two.name == {
        'path': 'random:3',
        'fingerprint': fingerprint(one.params),
        'dtype': 'float32',
        'network': describe(NETWORK),
    }
    assert other.fingerprint != one.fingerprint


def test_a_run_of_another_network_is_told_by_what_shapes_do_not_show(tmp_path):
    sft_run(tmp_path, random(3), tiny.SPECS['full'])
    load(str(tmp_path), network=Decoder(dataclasses.replace(tiny.CONFIG, remat='full')))  # how, not what
    said = 'INITIAL_CHECKPOINT_PATH: .* is of another network: rope_theta is 100.0 there and 5000.0 here'
    with pytest.raises(UserError, match=said):
        load(str(tmp_path), network=Decoder(dataclasses.replace(tiny.CONFIG, rope_theta=5e3)))
    with pytest.raises(UserError, match="names 'random:3' as its base is of another network: norm_epsilon"):
        bases.load_recorded(Decoder(dataclasses.replace(tiny.CONFIG, norm_epsilon=1e-3)), random(3).name, ONE)
    older = {key: value for key, value in random(3).name.items() if key != 'network'}
    bases.check_network(Decoder(dataclasses.replace(tiny.CONFIG, rope_theta=5e3)), older, 'the run')


def test_bfloat16_is_the_same_weights_in_half_the_room():
    half, whole = random(3, 'bfloat16'), random(3)
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {jnp.dtype(jnp.bfloat16)}
    assert tiny.same(half.params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole.params))


@pytest.mark.parametrize('spec', [tiny.SPECS['lora'], tiny.SPECS['full']], ids=['lora', 'full'])
def test_an_sft_run_is_a_base_with_its_adapter_merged_in(tmp_path, spec):
    first = random(3)
    adapter = sft_run(tmp_path, first, spec)
    base = load(str(tmp_path))
    assert base.path == str(tmp_path)
    tiny.assert_close(base.params, lora.merge(first.params, adapter), atol=1e-6)
    assert base.fingerprint != first.fingerprint


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_policy_is_a_base_too_with_the_scale_of_each_of_its_layers(tmp_path, dtype):
    first = random(3, dtype)
    adapter = tiny.adapter(tiny.SPECS['lora'], first.params, head=False)
    layers = {path.rpartition('/')[0] for path in traverse_util.flatten_dict(adapter.lora, sep='/')}
    each = tuple(0.5 + i for i in range(NETWORK.config.num_layers))
    adapter = lora.rescaled(adapter, 0.1).replace(scale=tuple((layer, each) for layer in sorted(layers)))
    sft_run(tmp_path, first, None, phase='policy', adapter=adapter)
    tiny.assert_close(load(str(tmp_path), dtype=dtype).params, lora.merge(first.params, adapter), atol=1e-6)
    read, _ = finished.read_adapter(str(tmp_path), 'policy', phase='policy', flag='')
    assert read.scale == adapter.scale


def test_runs_on_runs(tmp_path):
    """LoRA on a LoRA run on random weights: each names the one below."""
    first = random(3)
    one = sft_run(tmp_path / 'a', first, tiny.SPECS['lora'])
    second = load(str(tmp_path / 'a'))
    two = sft_run(tmp_path / 'b', second, tiny.SPECS['lora-all-linear'])
    base = load(str(tmp_path / 'b'))
    tiny.assert_close(base.params, lora.merge(lora.merge(first.params, one), two), atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_base_is_found_again_by_its_name(dtype):
    base = random(3, dtype)
    with ONE.scope():
        again = bases.load_recorded(NETWORK, base.name, ONE)
    assert again.name == base.name


def test_a_base_that_has_changed_is_refused():
    with ONE.scope(), pytest.raises(UserError, match='has changed since the run that names it'):
        bases.load_recorded(NETWORK, random(3).name | {'fingerprint': 'other'}, ONE)


def test_a_base_that_was_moved_is_found_where_it_is_now(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sft_run(tmp_path / 'sft', random(3), lora.FullSpec())
    name = load('sft').name  # as a recipe names it
    monkeypatch.chdir('/')
    with ONE.scope():
        assert bases.load_recorded(NETWORK, name, ONE).name == name  # from another folder
        shutil.move(tmp_path / 'sft', tmp_path / 'moved')
        with pytest.raises(UserError, match=f"INITIAL_CHECKPOINT_PATH: '{tmp_path}/sft' is no"):
            bases.load_recorded(NETWORK, name, ONE)
        again = bases.load_recorded(NETWORK, name, ONE, str(tmp_path / 'moved'))
    assert again.fingerprint == name['fingerprint']


@pytest.mark.parametrize('dtype', ['bf16', 'int8', None])
def test_no_such_dtype(dtype):
    with pytest.raises(UserError, match="BaseConfig.dtype = .*: give 'float32', 'bfloat16' or 'float16'"):
        BaseConfig(NETWORK, dtype=dtype)


# What is wrong with a path.


def test_no_such_path(tmp_path):
    with pytest.raises(UserError, match=f"'{tmp_path}/x' is no .gguf file, no Hugging Face or T5X checkpoint"):
        load(f'{tmp_path}/x')
    with pytest.raises(UserError, match=f"INITIAL_CHECKPOINT_PATH: '{tmp_path}' is not the MODEL_DIR of a run"):
        load(str(tmp_path))
    (tmp_path / 'adapter_config.json').write_text('{}')
    with pytest.raises(UserError, match='is an adapter of PEFT; make a MODEL_DIR of it with `perl_jax import'):
        load(str(tmp_path))


def test_what_is_missing_is_seen_without_loading_it(tmp_path):
    check = lambda path: bases.check(BaseConfig(NETWORK, str(path)))  # noqa: E731
    for path, said in (('none', 'is no .gguf file'), ('none.gguf', 'there is no such file')):
        with pytest.raises(UserError, match=said):
            check(tmp_path / path)
    hf.save(tmp_path / 'hf', NETWORK, random(3).params, 'float32')
    sft_run(tmp_path / 'sft', random(3), lora.FullSpec())
    check(tmp_path / 'hf'), check(tmp_path / 'sft')
    (tmp_path / 'hf/model.safetensors').unlink()
    with pytest.raises(UserError, match='hf: neither model.safetensors nor'):
        check(tmp_path / 'hf')


def test_a_run_of_another_phase(tmp_path):
    sft_run(tmp_path, random(3), tiny.SPECS['lora'], phase='reward')
    with pytest.raises(UserError, match='is a run of reward; name one of sft or policy'):
        load(str(tmp_path))


@pytest.mark.parametrize(('change', 'said'), [
    ({'logits_via_embedding': False}, 'lacks tensor decoder/logits_dense/kernel'),
    ({'mlp_dim': 40}, r'decoder/layers/mlp/wi_0/kernel has shape \[2, 32, 48\].* \[2, 32, 40\]'),
    ({'vocab_size': 57}, r'token_embedder/embedding has shape \[56, 32\].* \[57, 32\]'),
], ids=['missing', 'width', 'vocabulary'])  # fmt: skip
def test_weights_of_another_model(tmp_path, change, said):
    sft_run(tmp_path, random(3), tiny.SPECS['full'], older=True)
    with pytest.raises(UserError, match=said):
        load(str(tmp_path), network=Decoder(dataclasses.replace(tiny.CONFIG, **change)))
    sft_run(tmp_path / 'new', random(3), tiny.SPECS['full'])
    with pytest.raises(UserError, match=f'is of another network: {min(change)} is '):
        load(str(tmp_path / 'new'), network=Decoder(dataclasses.replace(tiny.CONFIG, **change)))


def test_a_tensor_too_many(tmp_path):
    with ONE.scope():
        untied = bases.load(BaseConfig(tiny.UNTIED), ONE, 3)
    sft_run(tmp_path, untied, tiny.SPECS['full'], older=True)
    with pytest.raises(UserError, match='has the extra tensor decoder/logits_dense/kernel'):
        load(str(tmp_path))


def test_random_weights_start_as_t5x_has_them():
    shapes = jax.tree.map(np.shape, random(3).params)
    assert shapes == jax.tree.map(np.shape, tiny.base())
    assert np.std(random(3).params['token_embedder']['embedding']) == pytest.approx(0.02, rel=0.1)


def test_of_a_reward_run_the_best_checkpoint_is_read(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), 'auc')
    for step, auc in ((1, 0.7), (2, 0.9), (3, 0.8)):
        adapter = lora.Adapter(head={'kernel': jnp.full(3, float(step))})
        about = {'phase': 'reward', 'base': {}, 'adapters': {'reward': {'scale': 1.0, 'dropout': 0.0}}}
        checkpoints.save(step, {'reward': types.TrainState(jnp.int32(step), adapter, ())}, about, {'auc': auc})
    checkpoints.close()
    adapter, _ = finished.read_adapter(str(tmp_path), 'reward', phase='reward', flag='x')
    np.testing.assert_array_equal(adapter.head['kernel'], 2.0)


def test_a_file_of_a_package_is_found_again_by_its_name(tmp_path, monkeypatch):
    """Its name was once made a path of the folder that the run began in."""
    pytest.importorskip('gguf')
    import tiny_gguf

    (tmp_path / 'weights_in_a_package').mkdir()
    (tmp_path / 'weights_in_a_package/__init__.py').touch()
    tiny_gguf.write(tmp_path / 'weights_in_a_package/m.gguf')
    monkeypatch.syspath_prepend(tmp_path)
    network = Decoder(tiny_gguf.CONFIG)
    name = load('package:weights_in_a_package/m.gguf', network=network).name
    assert name['path'] == 'package:weights_in_a_package/m.gguf'
    with ONE.scope():
        assert bases.load_recorded(network, name, ONE).name == name
