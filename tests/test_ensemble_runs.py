"""Whole small runs: an ensemble trained together, a policy that learns from it, and its average."""

import json

import numpy as np
import pytest
from toy_runs import perl, quoted, ran, rows, state, toy, toys  # noqa: F401

from perl_jax.runs import finished

pytestmark = pytest.mark.slow

# ruff: noqa: F811 (a fixture is shared by importing it)

MEMBERS = (
    '--gin_file=tuning/lora_ensemble.gin', '--gin.TUNING=[@m0/lora.LoraSpec(), @m1/lora.LoraSpec()]',
    '--gin.m1/lora.LoraSpec.rank=3', '--gin.m1/lora.LoraSpec.dropout=0.05',
)  # fmt: skip


@pytest.fixture(scope='module')
def ensemble(toys, tmp_path_factory):
    folder = tmp_path_factory.mktemp('ensemble') / 'run'
    ran(*toy('reward', folder, toys.sources[0], *MEMBERS))
    return folder


def test_members_differ_and_share_their_heads_start(ensemble, toys, tmp_path):
    saved, about = state(ensemble), json.loads((ensemble / 'run.json').read_text())
    heads = [saved[f"['reward_{i}']['adapter']['head']['kernel']"] for i in range(2)]
    assert 0 < np.abs(heads[0] - heads[1]).max() < 0.5  # one start, six steps apart
    ranks = [{x.shape[-1] for path, x in saved.items() if f"reward_{i}']['adapter']['lora']" in path and path.endswith("['a']")} for i in range(2)]  # noqa: E501
    assert ranks == [{8}, {3}]
    assert about['trainable_parameters'] == sum(x.size for path, x in saved.items() if "['adapter']" in path)
    alone = tmp_path / 'alone'  # the first member is the run that it would have been
    ran(*toy('reward', alone, toys.sources[0], '--gin.HEAD_SEED=0'))
    single = state(alone)
    for path, x in single.items():
        if "['adapter']" in path:
            np.testing.assert_allclose(saved[path.replace('reward', 'reward_0', 1)], x, atol=1e-4)


def test_it_is_measured_by_its_mean_and_a_policy_learns_from_it(ensemble, toys, tmp_path):
    result = ran('eval', f'--model_dir={ensemble}')
    assert 'pairwise_accuracy' in result.out
    folder = tmp_path / 'policy'
    flags = quoted('REWARD_MODEL_DIR', ensemble), '--gin.rewards.LearnedReward.aggregate=@ensembles.lower_bound'
    ran(*toy('policy', folder, toys.sources[0], *flags, '--gin.TRAIN_STEPS=2'))
    last = [row for row in rows(folder) if 'loss/policy' in row][-1]
    assert last['reward/disagreement'] > 0 and 0 < last['reward/order_disagreement'] < 1


def test_its_average_is_a_reward_run(ensemble, toys, tmp_path):
    exact, cut = tmp_path / 'exact', tmp_path / 'cut'
    ran('average', f'--model_dirs={ensemble},{toys.reward}', f'--model_dir={exact}')
    said = ran('average', f'--model_dirs={ensemble}', f'--model_dir={cut}', '--rank=2').err
    assert 'rank 2 is' in said and 'off the exact average' in said
    adapter, about = finished.read_adapter(str(exact), 'reward', phase='reward', flag='')
    assert adapter.lora['decoder']['layers']['self_attention']['query']['a'].shape[-1] == 8 + 3 + 8
    assert about['base']['fingerprint'] == json.loads((toys.reward / 'run.json').read_text())['base']['fingerprint']
    for folder in (exact, cut):
        assert 'pairwise_accuracy' in ran('eval', f'--model_dir={folder}').out


def test_what_cannot_be_averaged(ensemble, toys, tmp_path):
    out = f'--model_dir={tmp_path / "out"}'
    phases = f'--model_dirs={ensemble},{toys.policy}'
    assert 'is a run of policy; name one of reward' in perl('average', phases, out).line
    both = f'--model_dirs={ensemble},{toys.reward_full}'
    assert 'some of these runs use LoRA and some full tuning' in perl('average', both, out).line
    assert 'is there already' in perl('average', f'--model_dirs={ensemble}', f'--model_dir={toys.sft}').line
    assert 'make one of an ensemble with perl_jax average' in perl(
        'export', f'--model_dir={ensemble}', '--format=hf', f'--output={tmp_path / "hf"}'
    ).line
    assert not (tmp_path / 'out').exists()
