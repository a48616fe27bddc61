"""What leaves by `perl_jax export` comes back by `perl_jax import`, or as a base, and is the same."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import json

import jax
import numpy as np
import pytest
from toy_runs import contents, perl, quoted, ran, rows, settings, toy, toys  # noqa: F401

from perl_jax.interop import hf
from perl_jax.models import lora
from perl_jax.models.decoder import Decoder
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs import finished
from perl_jax.runs.base import BaseConfig

pytestmark = pytest.mark.slow

MODEL = '--gin_file=models/toy.gin'


def export(folder, kind, output, *flags):
    return ran('export', f'--model_dir={folder}', f'--format={kind}', f'--output={output}', *flags)


def load(path):
    """A Hugging Face folder as a base."""
    partitioner, network = Partitioner(), hf.network(str(path))
    with partitioner.scope():
        return network, bases.load(BaseConfig(network, str(path)), partitioner, 0)


def merged(folder, role):
    """The parameters that a run ended with, and its adapter."""
    phase = json.loads((folder / 'run.json').read_text())['phase']
    adapter, about = finished.read_adapter(str(folder), role, phase=phase, flag='')
    network = toy_network()
    with settings(), Partitioner().scope():  # random weights hang on how their making is compiled
        return lora.merge(bases.load_recorded(network, about['base'], Partitioner()).params, adapter), adapter


def toy_network():
    import gin

    from perl_jax.cli import configure

    configure.configured('infer.eval_policy', ['models/toy.gin'], [], [])
    return gin.get_configurable('decoder.Decoder')()


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(two))


@pytest.mark.parametrize('name', ['sft', 'sft_lora', 'policy', 'policy_full'])
def test_merged_weights_are_a_base_again(toys, name, tmp_path):
    folder = getattr(toys, name)
    out = export(folder, 'hf', tmp_path / 'out').out
    assert out.strip() == str(tmp_path / 'out')
    network, base = load(tmp_path / 'out')
    assert isinstance(network, Decoder) and network == toy_network()
    assert_same(base.params, merged(folder, 'policy')[0])
    assert json.loads((tmp_path / 'out/config.json').read_text())['architectures'] == ['LlamaForCausalLM']


def test_merged_weights_in_bfloat16(toys, tmp_path):
    export(toys.policy, 'hf', tmp_path / 'out', '--dtype=bfloat16')
    params, _ = merged(toys.policy, 'policy')
    wanted = jax.tree.map(lambda x: np.asarray(x, jax.numpy.bfloat16).astype(np.float32), params)
    assert_same(load(tmp_path / 'out')[1].params, wanted)


def test_a_reward_takes_its_head_along(toys, tmp_path):
    from safetensors.numpy import load_file

    export(toys.reward, 'hf', tmp_path / 'out')
    config = json.loads((tmp_path / 'out/config.json').read_text())
    assert config['architectures'] == ['LlamaForSequenceClassification'] and config['id2label'] == {'0': 'reward'}
    tensors = load_file(tmp_path / 'out/model.safetensors')
    params, adapter = merged(toys.reward, 'reward')
    np.testing.assert_array_equal(tensors['score.weight'], adapter.head['kernel'][None])
    np.testing.assert_array_equal(tensors['model.embed_tokens.weight'], params['token_embedder']['embedding'])
    assert 'lm_head.weight' not in tensors


def test_an_adapter_goes_out_and_comes_back(toys, tmp_path):
    """As peft has it, onto the same weights in Hugging Face's form; and it is the run that it came from."""
    export(toys.sft, 'hf', tmp_path / 'base')
    run = tmp_path / 'run'
    ran(*toy('reward', run, quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'base')))
    export(run, 'peft', tmp_path / 'adapter')
    config = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
    assert (config['r'], config['lora_alpha'], config['task_type']) == (8, 16, 'SEQ_CLS')
    assert config['target_modules'] == ['k_proj', 'o_proj', 'q_proj', 'v_proj']
    assert config['base_model_name_or_path'] == str(tmp_path / 'base')

    theirs = tmp_path / 'theirs'
    ran('import', '--format=peft', f'--input={tmp_path}/adapter', f'--model_dir={theirs}', MODEL)
    was, _ = finished.read_adapter(str(run), 'reward', phase='reward', flag='')
    now, about = finished.read_adapter(str(theirs), 'reward', phase='reward', flag='')
    assert (was.scale, was.dropout) == (now.scale, now.dropout)
    assert_same(was, now)
    # It serves a policy as a reward of our own does.
    flags = quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'base'), '--gin.TRAIN_STEPS=2'
    for reward in run, theirs:
        ran(*toy('policy', tmp_path / f'policy_{reward.name}', *flags, quoted('REWARD_MODEL_DIR', reward)))
    assert rows(tmp_path / 'policy_run') == rows(tmp_path / 'policy_theirs')


def test_weights_that_are_imported_are_a_run_to_start_from(toys, tmp_path):
    export(toys.sft, 'hf', tmp_path / 'weights')
    flags = f'--input={tmp_path}/weights', f'--model_dir={tmp_path}/sft', MODEL
    assert "weights' is a checkpoint of hf" in perl('import', '--format=t5x', *flags).line
    ran('import', '--format=hf', *flags)
    for name, source in ('a', toys.sft), ('b', tmp_path / 'sft'), ('c', tmp_path / 'weights'):
        ran(*toy('reward', tmp_path / name, quoted('INITIAL_CHECKPOINT_PATH', source), '--gin.TRAIN_STEPS=2'))
    assert rows(tmp_path / 'a') == rows(tmp_path / 'b') == rows(tmp_path / 'c')
    about = json.loads((tmp_path / 'sft/run.json').read_text())
    assert (about['phase'], about['tuning'], about['imported']) == ('sft', 'full', str(tmp_path / 'weights'))
    export(tmp_path / 'sft', 'hf', tmp_path / 'again')
    assert_same(load(tmp_path / 'again')[1].params, load(tmp_path / 'weights')[1].params)


def test_an_adapter_on_weights_that_nobody_else_can_load_says_what_to_export_first(toys, tmp_path):
    """It was a warning, with a base_model_name_or_path to edit by hand."""
    asked = 'export', f'--model_dir={toys.policy}', '--format=peft', f'--output={tmp_path}/out'
    line = perl(*asked).line
    assert f'--model_dir={toys.sft} --format=hf --output=FOLDER' in line and '--base=FOLDER' in line
    assert not list(tmp_path.iterdir())
    export(toys.sft, 'hf', tmp_path / 'sft')
    ran(*asked, f'--base={tmp_path}/sft')
    config = json.loads((tmp_path / 'out/adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == f'{tmp_path}/sft'
    assert 'no Hugging Face folder' in perl(*asked[:-1], f'--output={tmp_path}/no', f'--base={toys.sft}').line
    assert 'requires --format=peft' in perl(*asked[:2], '--format=hf', f'--output={tmp_path}/no', '--rank=2').line


def test_an_sft_run_with_full_tuning_is_in_no_adapter_of_the_weights_behind_it(toys, tmp_path):
    export(toys.sft, 'hf', tmp_path / 'weights')
    few = '--gin.TRAIN_STEPS=2', '--gin.EVAL_PERIOD=2'
    ran(*toy('sft', tmp_path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'weights'), *few))
    ran(*toy('reward', tmp_path / 'reward', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft'), *few))
    asked = 'export', f'--model_dir={tmp_path}/reward', '--format=peft', f'--output={tmp_path}/out'
    line = perl(*asked).line
    assert "sft' was full tuning" in line and '--base=FOLDER' in line and not (tmp_path / 'out').exists()
    assert "sft' was full tuning" in perl(*asked, f'--base={tmp_path}/weights').line


# Bad input.


def test_an_adapter_is_for_no_model_of_several_parts(tmp_path):
    """peft loaded it onto Gemma 3 with images without a word, and all of it was left out."""
    from perl_jax.errors import UserError
    from perl_jax.runs import rebase

    (tmp_path / 'config.json').write_text('{"model_type": "gemma3", "text_config": {}}')
    with pytest.raises(UserError, match='several parts .model_type gemma3.*--base=FOLDER'):
        rebase.check_is_text_model(str(tmp_path))
    (tmp_path / 'config.json').write_text('{"model_type": "gemma3_text"}')
    rebase.check_is_text_model(str(tmp_path))


def test_a_folder_that_is_there_is_left_alone(toys, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/mine').write_text('x')
    result = perl('export', f'--model_dir={toys.policy}', '--format=hf', f'--output={tmp_path}/out')
    assert 'not empty' in result.line
    assert [p.name for p in tmp_path.iterdir()] == ['out'] and contents(tmp_path / 'out')


@pytest.mark.parametrize(('name', 'kind', 'says'), [
    ('policy_full', 'peft', '--format=hf'), ('policy', 't5x', 'encoder-decoder'), ('policy', 'onnx', '--format'),
])  # fmt: skip
def test_what_has_no_such_form_is_said_and_leaves_nothing(toys, name, kind, says, tmp_path):
    result = perl('export', f'--model_dir={getattr(toys, name)}', f'--format={kind}', f'--output={tmp_path}/out')
    assert says in result.line
    assert not list(tmp_path.iterdir())


@pytest.fixture
def weights(toys, tmp_path):
    export(toys.sft, 'hf', tmp_path / 'weights')
    return tmp_path / 'weights'


def edit(file, **changes):
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not ...}))


def truncate(weights):
    path = weights / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])


def rename(weights, old, new, shape=None):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(weights / 'model.safetensors')
    x = tensors.pop(old)
    if new:
        tensors[new] = x if shape is None else x.reshape(shape)
    save_file(tensors, weights / 'model.safetensors')


NORM = 'model.layers.1.input_layernorm.weight'
DAMAGES = {
    'truncated': (truncate, 'truncated in tensor'),
    'missing': (lambda w: rename(w, NORM, None), f'lacks tensor {NORM}'),
    'extra': (lambda w: rename(w, NORM, 'model.layers.9.x'), f'lacks tensor {NORM}'),
    'shape': (lambda w: rename(w, NORM, NORM, (8, 8)), 'has shape [8, 8], the model wants [64]'),
    'architecture': (lambda w: edit(w / 'config.json', model_type='bert'), "'bert' is not supported"),
    'size': (lambda w: edit(w / 'config.json', hidden_size=32), 'emb_dim is 32'),
    'theta': (lambda w: edit(w / 'config.json', rope_theta=5e5), 'rope_theta is 500000.0'),
    'activation': (lambda w: edit(w / 'config.json', hidden_act='relu'), "hidden_act = 'relu'"),
    'key': (lambda w: edit(w / 'config.json', vocab_size=...), 'vocab_size is 32000'),  # Llama's own default
    'json': (lambda w: (w / 'config.json').write_text('{'), 'not JSON'),
    'no weights': (lambda w: (w / 'model.safetensors').unlink(), 'neither model.safetensors nor'),
    'no header': (lambda w: (w / 'model.safetensors').write_bytes(b'\0' * 7), 'not a safetensors file'),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_damaged_weights_are_named(weights, damage, tmp_path):
    do, says = DAMAGES[damage]
    do(weights)
    result = perl('import', '--format=hf', f'--input={weights}', f'--model_dir={tmp_path}/run', MODEL)
    assert says in result.line, result.line
    assert [p.name for p in tmp_path.iterdir()] == ['weights']


def test_an_unknown_dtype_is_named(weights, tmp_path):
    path = weights / 'model.safetensors'
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F8 "', 1))
    result = perl('import', '--format=hf', f'--input={weights}', f'--model_dir={tmp_path}/run', MODEL)
    assert 'dtype F8' in result.line


def test_a_name_of_the_hub_says_at_once_that_it_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    where = '--gin.INITIAL_CHECKPOINT_PATH="hf://nobody/nothing"'
    result = perl(*toy('sft', tmp_path / 'run', where))
    assert 'hf://nobody/nothing: cannot be had from the hub' in result.line


def test_a_sharded_checkpoint_reads_the_same(toys, tmp_path, monkeypatch):
    export(toys.sft, 'hf', tmp_path / 'one')
    monkeypatch.setattr('perl_jax.interop.safetensors.SHARD_BYTES', 200_000)
    export(toys.sft, 'hf', tmp_path / 'many')
    assert len(list((tmp_path / 'many').glob('model-*-of-*.safetensors'))) > 2
    assert_same(load(tmp_path / 'one')[1].params, load(tmp_path / 'many')[1].params)
    next((tmp_path / 'many').glob('model-00002*')).unlink()
    result = perl('import', '--format=hf', f'--input={tmp_path}/many', f'--model_dir={tmp_path}/run', MODEL)
    assert 'no such shard' in result.line


def test_partitioning_abstract_is_what_is_read(toys, tmp_path):
    export(toys.sft, 'hf', tmp_path / 'out')
    network, base = load(tmp_path / 'out')
    shapes, _ = partitioning.abstract_params(network)
    assert jax.tree.map(lambda x: x.shape, base.params) == jax.tree.map(lambda x: x.shape, shapes)


def test_three_phases_of_a_model_without_a_gin_file_of_its_own(toys, tmp_path):
    """The network of each is that of the weights, found through the run that it starts from."""
    export(toys.sft, 'hf', tmp_path / 'weights')
    model = '--gin_file=models/from_hf.gin', '--gin.TRAIN_STEPS=2', '--gin_file=tuning/lora.gin'
    ran(*toy('sft', tmp_path / 'sft', quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'weights'), *model))
    start = quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'sft'), *model
    ran(*toy('reward', tmp_path / 'reward', *start))
    reward = quoted('REWARD_MODEL_DIR', tmp_path / 'reward')
    ran(*toy('policy', tmp_path / 'policy', *start, reward))
    assert ran('sample', f'--model_dir={tmp_path}/policy', '--num=2').out
    ran('eval', f'--model_dir={tmp_path}/reward')
    export(tmp_path / 'policy', 'hf', tmp_path / 'out')
    assert hf.network(str(tmp_path / 'out')) == toy_network()
    line = perl(*toy('reward', tmp_path / 'no', quoted('INITIAL_CHECKPOINT_PATH', toys.sft), *model)).line
    assert "sft' started from 'random:0', which does not describe its network" in line


def test_weights_are_imported_by_their_own_config(toys, tmp_path):
    export(toys.sft, 'hf', tmp_path / 'weights')
    imported, model = tmp_path / 'imported', '--gin_file=models/from_hf.gin'
    ran('import', '--format=hf', f'--input={tmp_path}/weights', f'--model_dir={imported}', model)
    export(imported, 'hf', tmp_path / 'again')  # by what its config.gin says
    assert_same(load(tmp_path / 'again')[1].params, load(tmp_path / 'weights')[1].params)


def test_a_reward_that_is_exported_comes_back_with_its_scores(toys, tmp_path):
    """As a classifier of transformers: it rewards a policy and judges, and no SFT run starts from it."""
    export(toys.reward, 'hf', tmp_path / 'classifier')
    ran('import', '--format=hf', f'--input={tmp_path}/classifier', f'--model_dir={tmp_path}/theirs', MODEL)
    about = json.loads((tmp_path / 'theirs/run.json').read_text())
    assert (about['phase'], about['tuning']) == ('reward', 'full')
    flags = quoted('INITIAL_CHECKPOINT_PATH', toys.sft), '--gin.TRAIN_STEPS=2'
    for name, reward in ('ours', toys.reward), ('theirs', tmp_path / 'theirs'):
        ran(*toy('policy', tmp_path / f'policy_{name}', *flags, quoted('REWARD_MODEL_DIR', reward)))
    logged = [rows(tmp_path / f'policy_{name}') for name in ('ours', 'theirs')]
    scores = [[row['eval/score'] for row in each if 'eval/score' in row] for each in logged]
    np.testing.assert_allclose(*scores, atol=1e-5)
    start = quoted('INITIAL_CHECKPOINT_PATH', tmp_path / 'classifier')
    assert 'is a classifier' in perl(*toy('reward', tmp_path / 'no', start)).line
    assert not (tmp_path / 'no').exists()
