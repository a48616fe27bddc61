"""Bindings that nothing reads: those of flags are refused in a line that has the way, those of files are reported."""

import sys
import types

import gin
import pytest
from toy_runs import configured, perl, quoted, toy

from perl_jax.cli import configure, unread
from perl_jax.errors import UserError

NOWHERE = quoted('INITIAL_CHECKPOINT_PATH', 'nowhere'), quoted('REWARD_MODEL_DIR', 'nowhere')
PPO = '--gin_file=algorithms/ppo.gin'
ENSEMBLE = '--gin_file=tuning/lora_ensemble.gin'
VALUE_RANK = '--gin.value/lora.LoraSpec.rank=2'
VALUE_SPEC = '--gin.value/tuning.Tuning.spec=@value/lora.LoraSpec()'

UNREAD = {
    'a scope that ends at a macro': ('policy', VALUE_RANK, [
        "value/tuning.Tuning.spec is a macro's", "--gin.value/tuning.Tuning.spec='@value/lora.LoraSpec()'",
    ]),
    'a misspelt scope': ('policy', '--gin.vlaue/optax.adafactor.learning_rate=1.0', [
        "no scope 'vlaue'", 'OPTIMIZER/optax.adafactor, value/optax.adafactor, and plain optax.adafactor',
    ]),
    'a misspelt data set': ('policy', '--gin.trian/data.DatasetConfig.limit=4', [
        "no scope 'trian'", 'train/data.DatasetConfig',
    ]),
    'a member of no ensemble': ('reward', '--gin.m1/lora.LoraSpec.rank=4', ["no scope 'm1'", 'TUNING/lora.LoraSpec']),
    'another optimizer': ('policy', '--gin.optax.adam.learning_rate=1', ['has no optax.adam', '@optax.adam()']),
    'another algorithm': ('policy', '--gin.ppo.PPO.epochs=2', ['has no ppo.PPO', '@ppo.PPO()']),
    'another tuning': ('sft', '--gin.lora.LoraSpec.rank=2', ['has no lora.LoraSpec']),
    'a function': ('policy', '--gin.shaping.clip.limit=1', ['has no shaping.clip']),
    'what another phase reads': ('sft', '--gin.train_policy.train.base=None', ['has no train_policy.train']),
}  # fmt: skip


@pytest.mark.parametrize('name', UNREAD)
def test_a_flag_that_nothing_reads(name, tmp_path):
    phase, flag, words = UNREAD[name]
    line = perl(*toy(phase, tmp_path / 'run', *NOWHERE[: {'sft': 0, 'reward': 1, 'policy': 2}[phase]], flag)).line
    parameter = flag.removeprefix('--gin.').partition('=')[0]
    assert f'nothing reads {parameter}: ' in line and all(word in line for word in words), line
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(('phase', 'flags', 'bindings'), [
    ('policy', [VALUE_SPEC, VALUE_RANK], ['value/LoraSpec.rank = 2', 'LoraSpec.rank = 8']),
    ('policy', ['--gin.TUNING/lora.LoraSpec.rank=2'], ['LoraSpec.rank = 2']),
    ('policy', [PPO, '--gin.ppo.PPO.epochs=2'], ['PPO.epochs = 2']),
    ('policy', ['--gin.SHAPING=[@shaping.clip]', '--gin.shaping.clip.limit=1'], ['clip.limit = 1']),
    ('policy', ['--gin.value/optax.adafactor.learning_rate=0.5'], ['value/adafactor.learning_rate = 0.5']),
    ('reward', [ENSEMBLE, '--gin.m1/lora.LoraSpec.rank=4'], ['m1/LoraSpec.rank = 4', 'm2/LoraSpec.rank = 8']),
    ('sft', ['--gin.data.DatasetConfig.max_dropped=0.5'], ['train/DatasetConfig.max_dropped = 0.5']),
])  # fmt: skip
def test_a_flag_that_is_read(phase, flags, bindings):
    text = configured(*toy(phase, 'x', *NOWHERE[: {'sft': 0, 'reward': 1, 'policy': 2}[phase]], *flags))
    assert set(bindings) <= {*text.splitlines()}, text


def test_a_file_of_ones_own_is_reported_and_the_packages_files_are_not(tmp_path):
    (tmp_path / 'mine.gin').write_text("include 'tuning/lora.gin'\noptax.adam.b1 = 0.5\nlora.LoraSpec.rank = 2\n")
    result = perl(*toy('sft', tmp_path / 'run', f'--gin_file={tmp_path}/mine.gin', '--gin.TRAIN_STEPS=0'))
    assert 'gin: nothing reads optax.adam.b1, which a file sets' in result.err, result.err
    result = perl(*toy('sft', tmp_path / 'run', '--gin_file=tuning/full.gin', '--gin.TRAIN_STEPS=0'))
    assert 'nothing reads' not in result.err


def module(monkeypatch, decorate):
    """A user's module whose function `rate` gin knows, and which Python code may call."""
    user_module = types.ModuleType('user_module')
    exec('def rate(x=1):\n    return x\n', user_module.__dict__)
    registered = decorate(user_module.rate, module='user_module')
    monkeypatch.setitem(sys.modules, 'user_module', user_module)
    return user_module, registered


def test_what_python_code_calls_by_itself_is_read(monkeypatch):
    user_module, registered = module(monkeypatch, gin.configurable)
    with configure.restored_state():
        gin.configurable('start', module='tests')(lambda: None)
        gin.parse_config('user_module.rate.x = 2')
        with pytest.raises(UserError, match='nothing reads user_module.rate.x'):  # only a reference would reach it
            unread.check('tests.start', (), ['user_module.rate.x'], ())
        user_module.rate = registered
        unread.check('tests.start', (), ['user_module.rate.x'], ())
