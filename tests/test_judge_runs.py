"""`perl_jax judge` with runs of the toy recipes, by its command line."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import json
import shutil

import numpy as np
import pytest
from test_endpoint import said, serve  # noqa: F401
from toy_runs import perl, ran, rows, settings, toy, toys  # noqa: F401

from perl_jax.cli import configure
from perl_jax.data import datasets, texts
from perl_jax.data.datasets import DatasetConfig
from perl_jax.evals.judging import cautions, judge
from perl_jax.evals.judging.replies import CUT
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.rewards import sources
from perl_jax.runs import base, lineage
from perl_jax.tasks import toy as toy_tasks
from perl_jax.tokenizers import vocabularies
from perl_jax.types import Rollout

pytestmark = pytest.mark.slow

LENGTHS = {'inputs': 26, 'targets': 24}


def judged(toys, *flags):
    return ['judge', f'--model_dir={toys.policy}', '--split=test', '--num=8', *flags]


def of_run(folder, phase, name, *args, **kwargs):
    """A function of a judge under its own configuration, as the command calls it."""
    with settings():
        config = [f'{folder}/config.gin', f'runs/infer_{phase}.gin']
        return configure.configured(name, config, [], [])(*args, model_dir=str(folder), **kwargs)


def test_texts_are_read_as_a_tasks_are():
    """Pairs of the toy task, and the prompts as they are cut to their end."""
    pairs = datasets.load(DatasetConfig('toy_pairs', LENGTHS, 4, 'test', limit=16), 'pairs')
    prompts = [example['inputs_pretokenized'] for example in pairs.examples]
    answers = [(e['chosen_pretokenized'], e['rejected_pretokenized']) for e in pairs.examples]
    got = texts.dataset(pairs.vocabulary, prompts, 26, answers)
    for name, want in pairs.arrays.items():
        have = got.arrays[name]
        cut = want[..., : have.shape[-1]]
        assert have.dtype == want.dtype and not want[..., have.shape[-1] :].any()
        np.testing.assert_array_equal(have, cut)
    short = texts.dataset(pairs.vocabulary, prompts, 4).arrays['inputs']
    ends = [row[mask][-4:] for row, mask in zip(pairs.arrays['inputs'], pairs.arrays['inputs_mask'])]
    np.testing.assert_array_equal(short, ends)


def test_a_prompt_stands_behind_bos_where_there_is_one():
    class WithBos(toy_tasks.WordVocabulary):
        bos_id = 2

    got = texts.dataset(WithBos(['a b c d']), ['a b', 'a b c d'], 3).arrays
    assert got['inputs'][0].tolist() == [2, 3, 4] and got['inputs'][1].tolist() == [2, 5, 6]


def test_a_reward_judges_a_policy_against_what_it_started_from(toys):
    out = ran(*judged(toys, '--against=sft', f'--judge={toys.reward}')).out
    result = json.loads((toys.policy / 'judge_test_reward_by_reward_against_sft.json').read_text())
    verdicts = rows(toys.policy, 'judge_test_reward_by_reward_against_sft.jsonl')
    assert set(result['metrics']) == {'win_rate', 'wins', 'ties', 'losses', 'length_controlled'}
    assert len(verdicts) == 8 == result['answers'] and 'test  win_rate' in out
    assert result['metrics']['win_rate']['value'] == pytest.approx(np.mean([row['credit'] for row in verdicts]))
    for row in verdicts:
        assert row['credit'] == (1 + np.sign(row['score'] - row['other_score'])) / 2


def test_a_reward_gives_texts_the_scores_that_eval_gives_the_task(toys):
    pairs = datasets.load(DatasetConfig('toy_pairs', LENGTHS, 4, 'test'), 'pairs')
    prompts = [e['inputs_pretokenized'] for e in pairs.examples]
    answers = [(e['chosen_pretokenized'], e['rejected_pretokenized']) for e in pairs.examples]
    (scores,) = of_run(toys.reward, 'reward', 'judging.models.score', prompts, answers, [(None, None)] * len(prompts))
    ran('eval', f'--model_dir={toys.reward}', '--split=test')
    want = json.loads((toys.reward / 'eval_test.json').read_text())['margin']['value']
    assert float((scores[:, 0] - scores[:, 1]).mean()) == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize('length', [3, 24])
def test_answers_get_the_scores_that_training_gives_them(toys, length):
    """Those that were cut too, to which training adds no EOS: what the policy samples, through its own reward."""
    with settings():
        files, bindings = [f'{toys.policy}/config.gin', 'runs/infer_policy.gin'], [f'MAX_DECODE_LENGTH = {length}']
        answers = configure.configured('infer.answer_split', files, bindings, [])(model_dir=str(toys.policy), num=8)
    twice, ids = [(row['response'],) * 2 for row in answers], [(row['ids'], None) for row in answers]
    prompts = [row['prompt'] for row in answers]
    cut = np.array([not row['ids']['ended'] for row in answers])
    assert cut.any() or length > 3
    (scores,) = of_run(toys.reward, 'reward', 'judging.models.score', prompts, twice, ids)
    ours, whole = scores.T
    np.testing.assert_allclose(ours, in_training(toys, answers), atol=1e-5)
    assert (np.abs(ours - whole) > 1e-3)[cut].all(), 'an EOS makes a difference'
    words = toy_tasks.vocabulary()
    tokens = [row['ids']['response'][: -1 if row['ids']['ended'] else None] for row in answers]
    plain = np.array([words.encode(row['response']) == x for row, x in zip(answers, tokens)])
    assert plain.any(), 'most tokens are what their text is read as'
    elsewhere = [(mine | {'vocabulary': 'byt5'}, None) for mine, _ in ids]
    (again,) = of_run(toys.reward, 'reward', 'judging.models.score', prompts, twice, elsewhere)
    np.testing.assert_allclose(again[plain, 0], ours[plain], atol=1e-5, err_msg='another vocabulary: texts, cut alike')


def in_training(toys, answers):
    """Scores [N] of rows by the policy's own source of reward."""

    def padded(key):
        rows = [row['ids'][key] for row in answers]
        mask = np.arange(max(map(len, rows))) < np.array([[len(row)] for row in rows])
        return np.array([[*row, *[0] * (mask.shape[1] - len(row))] for row in rows], np.int32), mask

    with settings():
        config = configure.configured('base.BaseConfig', [f'{toys.policy}/config.gin'], [], [])()
        partitioner = Partitioner()
        with partitioner.scope():
            frozen = base.load(config, partitioner, 0)
            score = sources.LearnedReward(str(toys.reward)).scorer(config.network, frozen, partitioner, None)
            (inputs, inputs_mask), (targets, targets_mask) = padded('prompt'), padded('response')
            rollout = Rollout(inputs, inputs_mask, targets[:, None], targets_mask[:, None], 0.0 * targets[:, None])
            return np.asarray(score(rollout, [])[0])[:, 0]


def test_an_ensemble_judges_by_its_mean_and_so_do_several_rewards(toys, tmp_path):
    ensemble = tmp_path / 'ensemble'
    members = '--gin_file=tuning/lora_ensemble.gin', '--gin.TUNING=[@m0/lora.LoraSpec(), @m1/lora.LoraSpec()]'
    ran(*toy('reward', ensemble, toys.sources[0], *members))
    ran(*judged(toys, '--against=sft', f'--judge={ensemble},{toys.reward_full}'))
    name = f'judge_test_reward_by_ensemble+{toys.reward_full.name}_against_sft.json'
    written = rows(toys.policy, f'{name}l')
    assert not any('ids' in key for key in written[0])
    what = {'split': 'test', 'num': 8}
    ours, theirs = (of_run(toys.policy, 'policy', 'infer.answer_split', anchor=x, **what) for x in (False, True))
    asked = (
        [row['prompt'] for row in ours], [(a['response'], b['response']) for a, b in zip(ours, theirs)],
        [(a['ids'], b['ids']) for a, b in zip(ours, theirs)],
    )  # fmt: skip
    first, second = (of_run(x, 'reward', 'judging.models.score', *asked) for x in (ensemble, toys.reward_full))
    assert first.shape == (2, 8, 2) and second.shape == (1, 8, 2) and np.abs(first[0] - first[1]).max() > 1e-4
    want = np.concatenate([first, second]).mean(0)
    np.testing.assert_allclose([(row['score'], row['other_score']) for row in written], want, atol=1e-6)
    assert json.loads((toys.policy / name).read_text())['cautions'] == []


def test_the_reward_that_a_policy_was_trained_on_is_no_judge_of_it(toys):
    result = ran(*judged(toys, '--against=sft', f'--judge={toys.reward}'))
    assert f"CAUTION: '{toys.policy}' was trained on the reward '{toys.reward}'" in result.err
    with settings():
        files = [f'{toys.policy}/config.gin']
        ((source,),) = configure.bindings(cautions.REWARD, files, [])
        assert source.model_dir == str(toys.reward)
        assert configure.bindings('train_policy.train.nothing', files, []) == [None]


def test_the_reward_is_known_when_its_folder_has_been_moved(toys, tmp_path):
    """And inside an average: run.json of policies and averages says what the rewards are, not where."""
    policy, reward, average = (tmp_path / name for name in ('policy', 'elsewhere', 'average'))
    shutil.copytree(toys.reward, reward)
    shutil.copytree(toys.policy, policy)
    about = json.loads((policy / 'run.json').read_text())
    assert about['rewards'] == lineage.rewards([str(toys.reward)]) == lineage.rewards([str(reward)]) != []
    for path in policy / 'config.gin', *(policy / 'configs').iterdir():
        path.write_text(path.read_text().replace(str(toys.reward), str(tmp_path / 'gone')))
    ran('average', f'--model_dirs={reward},{reward}', f'--model_dir={average}')
    about = (average / 'run.json').read_text()
    (average / 'run.json').write_text(about.replace(f'{reward}, {reward}', str(tmp_path / 'gone')))
    for judge_dir in reward, average:
        result = ran(
            'judge', f'--model_dir={policy}', '--split=test', '--num=8', '--against=sft', f'--judge={judge_dir}'
        )
        assert f"CAUTION: '{policy}' was trained on the reward '{judge_dir}'" in result.err


def test_a_reward_of_an_earlier_start_is_no_judge_either(toys, tmp_path):
    """A run may go on with another reward; config.gin names the last one, configs/ all."""
    folder = tmp_path / 'policy'
    shutil.copytree(toys.policy, folder)
    last = (folder / 'config.gin').read_text()
    assert str(toys.reward) in last
    (folder / 'config.gin').write_text(last.replace(str(toys.reward), str(toys.reward_full)))
    (folder / 'configs' / '3.gin').write_text((folder / 'config.gin').read_text())
    for reward in toys.reward, toys.reward_full:
        result = ran('judge', f'--model_dir={folder}', '--split=test', '--num=8', '--against=sft', f'--judge={reward}')
        assert f"CAUTION: '{folder}' was trained on the reward '{reward}'" in result.err


def test_a_run_is_asked_in_its_own_words(toys):
    """The same answer as `sample` gives without temperature; prompts of several lengths, none of them cut."""
    prompts = ['user: a latte please\n', 'user: a latte please\n' * 4]
    got = of_run(toys.policy, 'policy', 'judging.models.ask', prompts)
    cold = ['sample', f'--model_dir={toys.policy}', '--gin.TEMPERATURE=0.0', '--gin.MAX_DECODE_LENGTH=8']
    for prompt, answer in zip(prompts, (text.removesuffix(CUT) for text in got)):
        more = ["--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 24}", '--prompt=' + prompt.replace('\n', '\\n')]
        assert ran(*cold, *more).out.startswith(f'{prompt}{answer}\n  {{')


def test_an_imported_model_is_asked_with_the_tokenizer_beside_it(toys, monkeypatch, tmp_path):
    ran('export', f'--model_dir={toys.policy}', '--format=hf', f'--output={tmp_path}/weights')
    model = tmp_path / 'model'
    source = f'--input={tmp_path}/weights'
    ran('import', '--format=hf', source, f'--model_dir={model}', '--gin_file=models/toy.gin')
    asked, seen = [], []
    monkeypatch.setattr(vocabularies, 'vocabulary', lambda path: asked.append(path) or toy_tasks.vocabulary())
    read = judge.reading.read
    monkeypatch.setattr(judge.reading, 'read', lambda text, choices: seen.append(text) or read(text, choices))
    flags = [f'--judge={model}', '--rubric=harmless', '--judge_chat=chatml']
    result = perl(*judged(toys, *flags))
    assert result.code == 2 and 'no reply contains NO or YES' in result.err
    assert "'<|im_start|>', '<|im_end|>' are no tokens of the vocabulary" in result.err  # the toy has words alone
    assert asked == [f'{tmp_path}/weights'] and len(seen) == 8
    assert any(text.removesuffix(CUT) for text in seen), 'it said something'


def test_a_run_that_cannot_judge_is_told_from_one_that_sees_no_difference(toys):
    line = perl(*judged(toys, f'--against={toys.sft}', f'--judge={toys.sft}', '--rubric=helpful')).line
    assert 'no reply contains 1 or 2' in line and 'follows instructions' in line
    assert not list(toys.policy.glob('judge_test_helpful*'))


def test_an_endpoint_judges_and_is_not_asked_twice(toys, serve, monkeypatch):
    monkeypatch.setenv('TOY_KEY', 'secret')
    server = serve(lambda prompt, attempt: said('1'))
    flags = [f'--judge={server.url}', '--judge_model=tiny', '--judge_key=TOY_KEY', '--rubric=helpful']
    ran(*judged(toys, '--against=reference', *flags))
    result = json.loads((toys.policy / 'judge_test_helpful_by_tiny_against_reference.json').read_text())
    groups = {row['group'] for row in rows(toys.policy, 'judge_test_helpful_by_tiny_against_reference.jsonl')}
    q = 0.025 ** (1 / len(groups))
    tied = {'value': 0.5, 'low': pytest.approx(q / 2), 'high': pytest.approx(1 - q / 2)}
    assert result['metrics']['win_rate'] == tied, 'the first place is no merit'
    asked = len(server.requests)
    assert 8 < asked <= 16 and server.requests[0][2]['Authorization'] == 'Bearer secret'
    ran(*judged(toys, '--against=reference', *flags))
    assert len(server.requests) == asked
    assert 'secret' not in ''.join(path.read_text() for path in toys.policy.glob('judge_*.json*'))


@pytest.mark.parametrize(('flags', 'words'), [
    (['--model_dir=none', '--judge=none'], ["--judge: 'none'", 'no run.json']),
    (['--judge=none'], ['--model_dir']),
    (['--model_dir=none', '--judge=http://127.0.0.1:9/v1', '--judge_model=x', '--rubric=harmless'],
     ["--model_dir: 'none'", 'no run.json']),
    (['--model_dir=x', '--judge=x', '--num=few'], ['--num', "'few'"]),
])  # fmt: skip
def test_bad_arguments(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = perl('judge', *flags).line
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())
