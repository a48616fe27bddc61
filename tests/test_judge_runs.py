"""`perl_jax judge` with runs of the toy recipes, by its command line."""
# ruff: noqa: F811 (a fixture is shared by importing it)

import json

import numpy as np
import pytest
from test_endpoint import said, serve  # noqa: F401
from toy_runs import perl, ran, rows, settings, toys  # noqa: F401

from perl_jax import configure, data, texts
from perl_jax.data import DatasetConfig
from perl_jax.interop import vocabularies
from perl_jax.judging import judge
from perl_jax.tasks import toy as toy_tasks

LENGTHS = {'inputs': 26, 'targets': 24}


def judged(toys, *flags):
    return ['judge', f'--model_dir={toys.policy}', '--split=test', '--num=8', *flags]


def of_run(folder, phase, name, *args):
    """A function of a judge under its own configuration, as the command calls it."""
    with settings():
        config = [f'{folder}/config.gin', f'runs/infer_{phase}.gin']
        return configure.configured(name, config, [], [])(*args, model_dir=str(folder))


def test_texts_are_read_as_a_tasks_are():
    """Pairs of the toy task, and the prompts as they are cut to their end."""
    pairs = data.load(DatasetConfig('toy_pairs', LENGTHS, 4, 'test', limit=16), 'pairs')
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
    result = json.loads((toys.policy / 'judge_test_reward.json').read_text())
    verdicts = rows(toys.policy, 'judge_test_reward.jsonl')
    assert set(result['metrics']) == {'win_rate', 'wins', 'ties', 'losses', 'length_controlled'}
    assert len(verdicts) == 8 == result['answers'] and 'test  win_rate' in out
    assert result['metrics']['win_rate']['value'] == pytest.approx(np.mean([row['credit'] for row in verdicts]))
    for row in verdicts:
        assert row['credit'] == (1 + np.sign(row['score'] - row['other_score'])) / 2


def test_a_reward_gives_texts_the_scores_that_eval_gives_the_task(toys):
    pairs = data.load(DatasetConfig('toy_pairs', LENGTHS, 4, 'test'), 'pairs')
    prompts = [e['inputs_pretokenized'] for e in pairs.examples]
    answers = [(e['chosen_pretokenized'], e['rejected_pretokenized']) for e in pairs.examples]
    scores = of_run(toys.reward, 'reward', 'judging.models.score', prompts, answers)
    ran('eval', f'--model_dir={toys.reward}', '--split=test')
    want = json.loads((toys.reward / 'eval_test.json').read_text())['margin']['value']
    assert float((scores[:, 0] - scores[:, 1]).mean()) == pytest.approx(want, abs=1e-5)


def test_a_run_is_asked_in_its_own_words(toys):
    """The same answer as `sample` gives without temperature; prompts of several lengths, none of them cut."""
    prompts = ['user: a latte please\n', 'user: a latte please\n' * 4]
    got = of_run(toys.policy, 'policy', 'judging.models.ask', prompts)
    cold = ['sample', f'--model_dir={toys.policy}', '--gin.TEMPERATURE=0.0', '--gin.MAX_DECODE_LENGTH=8']
    for prompt, answer in zip(prompts, got):
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
    assert 'no answer names NO or YES' in perl(*judged(toys, *flags)).line
    assert asked == [f'{tmp_path}/weights'] and len(seen) == 8
    assert any(seen), 'it said something'


def test_a_run_that_cannot_judge_is_told_from_one_that_sees_no_difference(toys):
    line = perl(*judged(toys, f'--against={toys.sft}', f'--judge={toys.sft}', '--rubric=helpful')).line
    assert 'no answer names 1 or 2' in line and 'follows instructions' in line
    assert not list(toys.policy.glob('judge_test_helpful*'))


def test_an_endpoint_judges_and_is_not_asked_twice(toys, serve, monkeypatch):
    monkeypatch.setenv('TOY_KEY', 'secret')
    server = serve(lambda prompt, attempt: said('1'))
    flags = [f'--judge={server.url}', '--judge_model=tiny', '--judge_key=TOY_KEY', '--rubric=helpful']
    ran(*judged(toys, '--against=reference', *flags))
    result = json.loads((toys.policy / 'judge_test_helpful.json').read_text())
    assert result['metrics']['win_rate'] == {'value': 0.5, 'low': 0.5, 'high': 0.5}, 'the first place is no merit'
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
