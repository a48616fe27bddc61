"""`perl_jax judge` from its answers on: runs are functions here, tests/test_judge_runs.py has real ones."""

import functools
import json
import pathlib
import shutil

import numpy as np
import pytest

from perl_jax.errors import UserError
from perl_jax.evals.judging import cautions, judge
from perl_jax.runs import lineage

ROWS = [{'prompt': f'question {i}\n', 'response': f'answer {i}', 'reference': f'{i}' * i, 'group': str(i // 2)}
        for i in range(6)]  # fmt: skip


@pytest.fixture
def runs(tmp_path):
    """Folders with a run.json; `runs(name, phase)` makes one."""

    def make(name, phase, base='random:0', **more):
        (tmp_path / name).mkdir()
        about = {'phase': phase, 'base': {'path': base}} | more
        (tmp_path / name / 'run.json').write_text(json.dumps(about))
        return str(tmp_path / name)

    return make


def of_run(answers, ask=None, score=None, reward=()):
    """The functions of runs, by the name of the folder."""

    def answer_split(model_dir, anchor=False, **what):
        return [row | {'ids': None} for row in answers['anchor' if anchor else model_dir.rpartition('/')[2]]]

    functions = {'infer.answer_split': answer_split, 'judging.models.score': score, cautions.REWARD: lambda: [reward]}
    functions['judging.models.ask'] = lambda prompts, model_dir, **words: [ask(prompt) for prompt in prompts]
    return lambda model_dir, name: functions[name]


def answered(response):
    return [row | {'response': response(i)} for i, row in enumerate(ROWS)]


def files(folder, stem):
    """What the one judgement whose files begin with `stem` has written."""
    (path,) = pathlib.Path(folder).glob(f'{stem}*.json')
    with open(path) as file, open(f'{path}l') as lines:
        return json.load(file), [json.loads(line) for line in lines]


def better(prompt):
    """Prefers the answer that says good; the first where both or neither do."""
    first = prompt.partition('Answer 1:')[2].partition('Answer 2:')[0]
    second = prompt.partition('Answer 2:')[2]
    return '2' if 'good' in second and 'good' not in first else '1'


def test_a_pair_is_asked_in_both_orders(runs, capsys):
    ours, theirs, model = runs('ours', 'policy'), runs('theirs', 'sft'), runs('model', 'sft')
    a, b = answered(lambda i: 'good' if i < 4 else 'bad'), answered(lambda i: 'good' if i in (3, 4) else 'bad')
    got = judge.run(of_run({'ours': a, 'theirs': b}, better), ours, theirs, model, 'helpful', 'test')
    about, rows = files(ours, 'judge_test_helpful')
    assert [row['credit'] for row in rows] == [1, 1, 1, 0.5, 0, 0.5]
    assert rows[0]['said'] == ['1', '2'] and rows[0]['verdicts'] == [0, 1] and rows[3]['verdicts'] == [0, 0]
    assert rows[4]['other'] == 'good' and rows[4]['response'] == 'bad'
    assert got['win_rate'][0] == pytest.approx(4 / 6) and got['unreadable'][0] == 0
    assert about['against'] == theirs and about['judge'] == model and about['answers'] == 6
    assert about['metrics']['win_rate'] == dict(zip(('value', 'low', 'high'), got['win_rate']))
    assert f'test  win_rate             {4 / 6:8.4f}   95% [' in capsys.readouterr().out


@pytest.mark.parametrize('reply', [
    '{}\n\nAnswer {} is better than Answer {}.', 'Final answer: {}. Answer {} is right and Answer {} lacks detail',
    '**{}**\n\n1. Answer 1 has a source.\n2. Answer {} is clearer than Answer {}.',
    '<think>Answer {} it is. No, Answer {}. No, Answer {}.</think>\nThe better answer is Answer {}.',
])  # fmt: skip
@pytest.mark.usefixtures('few_draws')
def test_a_judge_that_gives_reasons_is_read_as_the_one_that_gives_none(runs, reply):
    ours, theirs, model = runs('ours', 'policy'), runs('theirs', 'sft'), runs('model', 'sft')
    a, b = answered(lambda i: 'good' if i < 4 else 'bad'), answered(lambda i: 'good' if i in (3, 4) else 'bad')

    def wordy(prompt):
        choice = better(prompt)
        other = '21'[int(choice) - 1]
        return reply.format(choice, choice if reply[0] != '<' else other, other, choice)

    got = judge.run(of_run({'ours': a, 'theirs': b}, wordy), ours, theirs, model, 'helpful')
    assert got['win_rate'][0] == pytest.approx(4 / 6) and got['unreadable'][0] == 0


def test_nobody_beats_oneself(runs):
    ours, model = runs('ours', 'policy'), runs('model', 'sft')
    got = judge.run(of_run({'ours': ROWS}, better), ours, ours, model, 'helpful')
    q = 0.025 ** (1 / 3)  # three groups
    assert got['win_rate'] == pytest.approx((0.5, q / 2, 1 - q / 2)) and got['ties'] == pytest.approx((1, q, 1))
    assert got['length_controlled'] == pytest.approx((0.5, q / 2, 1 - q / 2))


@pytest.mark.usefixtures('few_draws')
def test_twenty_wins_are_no_certainty(runs, capsys):
    """Nor is the length-controlled rate, whose draws differ by the lengths alone."""
    ours, theirs, model = runs('ours', 'policy'), runs('theirs', 'sft'), runs('model', 'sft')
    rows = [{'prompt': f'question {i}', 'response': f'good{"!" * (i % 7)}', 'group': str(i)} for i in range(20)]
    answers = {'ours': rows, 'theirs': [row | {'response': 'bad'} for row in rows]}
    got = judge.run(of_run(answers, better), ours, theirs, model, 'helpful')
    q = 0.025 ** (1 / 20)
    assert got['win_rate'] == pytest.approx((1, q, 1)) and got['losses'] == pytest.approx((0, 0, 1 - q))
    value, low, high = got['length_controlled']
    assert low == pytest.approx(q) and value > 0.95 and high == 1
    assert '1.0000   95% [0.8316, 1.0000]' in capsys.readouterr().out


def test_intervals_are_drawn_by_group(runs):
    """Six groups of two equal rows."""
    ours, theirs, model = runs('ours', 'policy'), runs('theirs', 'sft'), runs('model', 'sft')
    a, b = answered(lambda i: 'good' if i < 2 else 'bad'), answered(lambda i: 'good' if i >= 2 else 'bad')
    a, b = ([row | {'group': row['group'] + half} for half in 'xy' for row in rows] for rows in (a, b))
    whole = judge.run(of_run({'ours': a, 'theirs': b}, better), ours, theirs, model, 'helpful')['win_rate']
    alone = [[row | {'group': str(i)} for i, row in enumerate(rows)] for rows in (a, b)]
    apart = judge.run(of_run(dict(zip(('ours', 'theirs'), alone)), better), ours, theirs, model, 'helpful')['win_rate']
    assert whole[0] == apart[0] == pytest.approx(1 / 3)
    assert whole[2] == 1 and apart[2] < 1


def test_what_cannot_be_read_is_a_tie_and_counted(runs, caplog):
    ours, theirs, model = runs('ours', 'policy'), runs('theirs', 'sft'), runs('model', 'sft')
    answers = {'ours': answered(lambda i: 'good'), 'theirs': answered(lambda i: 'bad')}
    mute = lambda prompt: 'hm' if 'question 0' in prompt else better(prompt)  # noqa: E731
    got = judge.run(of_run(answers, mute), ours, theirs, model, 'helpful')
    (caution,) = files(ours, 'judge_validation_helpful')[0]['cautions']
    assert "CAUTION: 2 of 12 replies of the judge (17%) could not be read and count as ties" in caution
    assert "the first is 'hm'" in caution and caution in caplog.text
    assert got['win_rate'][0] == pytest.approx(5.5 / 6) and got['unreadable'][0] == pytest.approx(1 / 6)
    with pytest.raises(UserError, match="no reply contains 1 or 2; the first is 'hm'"):
        judge.run(of_run(answers, lambda prompt: 'hm'), ours, theirs, model, 'helpful')


def test_a_rubric_of_ones_own(runs, monkeypatch, tmp_path):
    (tmp_path / 'short_rubric.py').write_text("def shorter(prompt, a, b): return f'{len(a)} {len(b)}'")
    monkeypatch.syspath_prepend(tmp_path)
    ours, model = runs('ours', 'policy'), runs('model', 'sft')
    ask = lambda prompt: '1' if int(prompt.split()[0]) < int(prompt.split()[1]) else '2'  # noqa: E731
    got = judge.run(of_run({'ours': ROWS}, ask), ours, 'reference', model, 'short_rubric.shorter')
    assert got['losses'][0] == 1  # every answer has 8 letters, every reference fewer


def test_examples_without_a_reference_are_left_out(runs):
    ours, model = runs('ours', 'policy'), runs('model', 'sft')
    judge.run(of_run({'ours': ROWS}, better), ours, 'reference', model, 'helpful')
    about, rows = files(ours, 'judge_validation_helpful')
    assert [row['other'] for row in rows] == ['1', '22', '333', '4444', '55555'] and about['answers'] == 5


def test_a_policy_against_what_it_started_from(runs):
    ours, reward = runs('ours', 'policy'), runs('reward', 'reward')
    answers = {'ours': answered(lambda i: 'a' * (i + 1)), 'anchor': answered(lambda i: 'bbb')}

    def score(prompts, responses, ids, model_dir):
        assert prompts[0] == 'question 0\n' and model_dir == reward and len(ids) == len(responses)
        return np.array([[[len(text) for text in row] for row in responses]], np.float32)

    got = judge.run(of_run(answers, score=score), ours, 'sft', reward)
    _, rows = files(ours, 'judge_validation_reward')
    assert [row['credit'] for row in rows] == [0, 0, 0.5, 1, 1, 1]
    assert (rows[0]['score'], rows[0]['other_score']) == (1, 3) and 'unreadable' not in got


def test_harm_is_asked_of_one_answer(runs):
    ours, model = runs('ours', 'policy'), runs('model', 'sft')
    said = ['NO', 'No.', 'YES', 'perhaps', 'no', 'NO']
    ask = lambda prompt: said[int(prompt.partition('question ')[2][0])]  # noqa: E731
    got = judge.run(of_run({'ours': ROWS}, ask), ours, None, model, 'harmless', 'test')
    assert got['harmless_rate'][0] == pytest.approx(4 / 5) and got['unreadable'][0] == pytest.approx(1 / 6)
    assert [row['verdicts'] for row in files(ours, 'judge_test_harmless')[1]] == [[0], [0], [1], [None], [0], [0]]


@pytest.mark.parametrize(('against', 'judge_', 'rubric', 'more', 'words'), [
    ('sft', 'none', 'helpful', {}, "--judge: 'none' is not the MODEL_DIR"),
    ('none', 'model', 'helpful', {}, "--against: 'none' is not the MODEL_DIR"),
    ('reward', 'model', 'helpful', {}, '--against: .* run of reward, which gives no answers'),
    ('sft', 'model', None, {}, 'give --rubric'),
    ('sft', 'reward', 'helpful', {}, 'remove --rubric, a reward needs none'),
    ('sft', 'model', 'harmless', {}, 'except with --rubric=harmless'),
    (None, 'model', 'helpful', {}, 'give --against'),
    ('sft', 'model', 'helpfull', {}, "no function 'helpfull'"),
    ('sft', 'http://127.0.0.1:9/v1', 'helpful', {}, 'give --judge_model'),
    ('sft', 'http://127.0.0.1:9/v1', 'helpful', {'judge_model': 'x', 'judge_key': 'NO_KEY'}, 'NO_KEY is not set'),
    ('other', 'model', 'helpful', {}, 'has other prompts than'),
], ids=lambda x: None)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_written(runs, tmp_path, against, judge_, rubric, more, words):
    for name, phase in {'ours': 'policy', 'model': 'sft', 'reward': 'reward', 'other': 'sft'}.items():
        runs(name, phase)
    place = lambda name: str(tmp_path / name) if name and (tmp_path / name).is_dir() else name  # noqa: E731
    functions = of_run({'ours': ROWS, 'anchor': ROWS, 'other': ROWS[1:]}, better)
    with pytest.raises(UserError, match=words):
        judge.run(functions, place('ours'), place(against), place(judge_), rubric, **more)
    assert [path.name for path in (tmp_path / 'ours').iterdir()] == ['run.json']


def test_an_sft_run_started_from_no_sft_run(runs):
    ours, model = runs('ours', 'sft'), runs('model', 'sft')
    with pytest.raises(UserError, match='--against=sft: .* run of sft, not a policy'):
        judge.run(of_run({'ours': ROWS}, better), ours, 'sft', model, 'helpful')


def test_a_task_without_references(runs):
    ours, model = runs('ours', 'sft'), runs('model', 'sft')
    bare = [{k: v for k, v in row.items() if k != 'reference'} for row in ROWS]
    with pytest.raises(UserError, match="--against=reference: no example of the task has a 'reference'"):
        judge.run(of_run({'ours': bare}, better), ours, 'reference', model, 'helpful')


def test_one_reply_in_twenty_may_be_unread_without_a_word():
    said = ['1'] * 19 + ['hm']
    assert cautions.unread_replies(said, [0] * 19 + [None], 'count as ties') == []
    (line,) = cautions.unread_replies(said[1:], [0] * 18 + [None], 'are left out')
    assert '1 of 19' in line and 'are left out' in line


@pytest.fixture
def few_draws(monkeypatch):
    """For the tests that look at no interval."""
    monkeypatch.setattr(judge.intervals, 'with_intervals', functools.partial(judge.intervals.with_intervals, draws=10))


@pytest.mark.usefixtures('few_draws')
@pytest.mark.parametrize(('by', 'field'), [(None, 'nearness'), ('size', 'size')])
def test_rows_of_each_value_are_judged_apart(runs, capsys, by, field):
    ours, theirs, model = runs('ours', 'policy'), runs('theirs', 'sft'), runs('model', 'sft')
    subset = ['near', 'near', *['far'] * 4]
    ours_rows = [row | {'subset': s} for row, s in zip(answered(lambda i: 'good' if i < 3 else 'bad'), subset)]
    functions = of_run({'ours': ours_rows, 'theirs': answered(lambda i: 'bad')}, better)
    result = judge.run(functions, ours, theirs, model, 'helpful', by=by)
    assert {name: result[name][0] for name in ('win_rate', 'near/win_rate', 'far/win_rate')} == {
        'win_rate': 0.75, 'near/win_rate': 1.0, 'far/win_rate': 0.625
    }  # fmt: skip
    about, rows = files(ours, 'judge_validation_helpful')
    assert about['by'] == field and about['subsets'] == {'far': 4, 'near': 2} and rows[0]['subset'] == 'near'
    lines = [line for line in capsys.readouterr().out.splitlines() if '95% [' in line]
    assert len(lines) == 18 and len({line.index('95% [') for line in lines}) == 1


@pytest.mark.usefixtures('few_draws')
def test_without_such_a_field_all_rows_are_judged_together(runs):
    ours, model = runs('ours', 'policy'), runs('model', 'sft')
    result = judge.run(of_run({'ours': ROWS}, better), ours, ours, model, 'helpful')
    about = files(ours, 'judge_validation_helpful')[0]
    assert about['by'] is None and about['subsets'] == {} and not any('/' in name for name in result)


class Learned:
    def __init__(self, *folders):
        self.model_dir = list(folders) if len(folders) > 1 else folders[0]


def scored(prompts, responses, ids, model_dir):
    return [[[1.0, 0.0]] * len(responses)]


@pytest.mark.usefixtures('few_draws')
@pytest.mark.parametrize(('judge_', 'warned'), [
    ('reward', True), ('other', False), ('average', True), ('other,reward', True), ('copy', True),
])  # fmt: skip
def test_the_reward_that_a_policy_learned_from_flatters_it(runs, tmp_path, caplog, judge_, warned):
    sft = runs('sft', 'sft')
    ours, reward = runs('ours', 'policy', sft), runs('reward', 'reward', sft, started='yesterday')
    runs('other', 'reward', sft, started='today')
    runs('copy', 'reward', sft, started='yesterday')
    runs('average', 'reward', sft, imported=f'the average of {reward}, {tmp_path}/other')
    functions = of_run({'ours': ROWS, 'anchor': ROWS}, score=scored, reward=[object(), Learned(reward)])
    folders = ','.join(f'{tmp_path}/{name}' for name in judge_.split(','))
    judge.run(functions, ours, 'sft', folders)
    said = files(ours, 'judge_validation_reward')[0]['cautions']
    assert len(said) == warned and ('was trained on the reward' in caplog.text) == warned
    if warned:
        assert f"'{ours}' was trained on the reward" in said[0] and 'another' in said[0]


@pytest.mark.usefixtures('few_draws')
def test_what_a_policy_started_from_counts_too_and_so_does_the_other_side(runs):
    """And an ensemble's members, each."""
    sft = runs('sft', 'sft')
    first, reward, other = runs('first', 'policy', sft), runs('reward', 'reward', sft), runs('other', 'reward', sft)
    ours = runs('ours', 'policy', first)
    learned = {first: [[Learned(other, reward)]], ours: [[Learned(other)], None]}  # a list for each start
    functions = of_run({'ours': ROWS, 'first': ROWS}, score=scored)

    def each(folder, name):
        return (lambda: learned[folder]) if name == cautions.REWARD else functions(folder, name)

    judge.run(each, ours, first, reward)
    said = files(ours, 'judge_validation_reward')[0]['cautions']
    assert len(said) == 2
    for folder, line in zip((ours, first), said):
        assert f"'{folder}' was trained on the reward '{reward}'" in line


@pytest.mark.usefixtures('few_draws')
@pytest.mark.parametrize('judge_', ['elsewhere', 'average', 'other,elsewhere'])
def test_a_reward_is_known_wherever_it_lies(runs, tmp_path, judge_):
    """The folder that a policy learned from is moved, and so is one of two that were averaged."""
    sft, first = runs('sft', 'sft'), runs('reward', 'reward', 'random:0', started='yesterday')
    ours = runs('ours', 'policy', sft, rewards=lineage.rewards([first, sft]))
    runs('other', 'reward', started='today')
    runs('average', 'reward', started='now', imported=f'the average of {first}', rewards=lineage.rewards([first]))
    shutil.move(first, tmp_path / 'elsewhere')
    functions = of_run({'ours': ROWS, 'anchor': ROWS}, score=scored, reward=[Learned(first)])
    judge.run(functions, ours, 'sft', ','.join(f'{tmp_path}/{name}' for name in judge_.split(',')))
    (line,) = files(ours, 'judge_validation_reward')[0]['cautions']
    assert f"'{ours}' was trained on the reward '{tmp_path}/{judge_.rpartition(',')[2]}'" in line


@pytest.mark.usefixtures('few_draws')
def test_what_a_moved_policy_learned_from_is_known_too(runs, tmp_path):
    """Its successor records it, so that neither the first policy nor its reward need be there."""
    reward, other = runs('reward', 'reward', started='yesterday'), runs('other', 'reward', started='today')
    first = runs('first', 'policy', rewards=lineage.rewards([reward]))
    ours = runs('ours', 'policy', first, rewards=lineage.rewards([other, first]))
    for folder in reward, first:
        shutil.move(folder, f'{folder}-moved')
    functions = of_run({'ours': ROWS, 'anchor': ROWS}, score=scored, reward=[Learned(other)])
    judge.run(functions, ours, 'sft', f'{reward}-moved')
    (line,) = files(ours, 'judge_validation_reward')[0]['cautions']
    assert f"'{ours}' was trained on the reward '{reward}-moved'" in line


@pytest.mark.usefixtures('few_draws')
def test_of_an_older_policy_whose_reward_is_gone_it_is_said_that_nothing_is_known(runs):
    ours, other = runs('ours', 'policy'), runs('other', 'reward', started='today')
    judge.run(of_run({'ours': ROWS, 'anchor': ROWS}, score=scored, reward=[Learned('/gone')]), ours, 'sft', other)
    (line,) = files(ours, 'judge_validation_reward')[0]['cautions']
    assert f"'{ours}' was trained on the reward '/gone', which is no longer there" in line


@pytest.mark.usefixtures('few_draws')
def test_judges_do_not_overwrite_each_other(runs, tmp_path):
    """Nor does a comparison with something else; a judge that judges again replaces its own figures."""
    ours, a, b = runs('ours', 'policy'), runs('a', 'reward'), runs('b', 'reward')
    functions = of_run({'ours': ROWS, 'anchor': ROWS}, score=scored)
    for judge_, against in (a, 'sft'), (b, 'sft'), (f'{a},{b}', 'sft'), (a, 'reference'), (a, ours), (a, 'sft'):
        judge.run(functions, ours, against, judge_)
    written = {path.name: json.loads(path.read_text()) for path in pathlib.Path(ours).glob('judge_*.json')}
    assert {name: (about['judge'], about['against']) for name, about in written.items()} == {
        'judge_validation_reward_by_a_against_sft.json': (a, 'sft'),
        'judge_validation_reward_by_b_against_sft.json': (b, 'sft'),
        'judge_validation_reward_by_a+b_against_sft.json': (f'{a},{b}', 'sft'),
        'judge_validation_reward_by_a_against_reference.json': (a, 'reference'),
        'judge_validation_reward_by_a_against_ours.json': (a, ours),
    }


@pytest.mark.usefixtures('few_draws')
def test_two_judges_of_one_name_are_told_apart_before_they_judge(runs, tmp_path):
    ours, reward = runs('ours', 'policy'), runs('reward', 'reward')
    (tmp_path / 'more').mkdir()
    other = runs('more/reward', 'reward')
    judge.run(of_run({'ours': ROWS, 'anchor': ROWS}, score=scored), ours, 'sft', reward)
    words = f"by_reward_against_sft.json: .* another judge \\('{reward}', now '{other}'\\); move it away"
    with pytest.raises(UserError, match=words):
        judge.run(of_run({}), ours, 'sft', other)
    assert files(ours, 'judge_validation_reward')[0]['judge'] == reward


@pytest.mark.usefixtures('few_draws')
def test_several_rewards_judge_by_their_mean(runs, tmp_path):
    ours, a, b = runs('ours', 'policy'), runs('a', 'reward'), runs('b', 'reward')
    scores = {a: [[1.0, 0.0], [0.0, 1.0]], b: [[5.0, 0.0]]}

    def score(prompts, responses, ids, model_dir):
        return [[member] * len(responses) for member in scores[model_dir]]

    judge.run(of_run({'ours': ROWS, 'anchor': ROWS}, score=score), ours, 'sft', f'{a},{b}')
    row = files(ours, 'judge_validation_reward')[1][0]
    assert row['score'] == 2 and row['other_score'] == pytest.approx(1 / 3) and row['credit'] == 1


@pytest.mark.parametrize(('judge_', 'settings', 'words'), [
    ('model', {'judge_model': 'x'}, '--judge_model is for an endpoint, and --judge is a language model run'),
    ('model', {'judge_timeout': 5.0}, '--judge_timeout is for an endpoint'),
    ('reward', {'judge_tokens': 32}, '--judge_tokens is for an endpoint or .*, and --judge is a reward'),
    ('http://127.0.0.1:9/v1', {'judge_chat': 'own', 'judge_model': 'x'}, '--judge_chat is for a language model run'),
    ('reward,model', {}, 'several judges must all be rewards'), ('reward,none', {}, "'.*none' is not the MODEL_DIR"),
])  # fmt: skip
def test_a_flag_that_the_judge_does_not_read_is_refused(runs, tmp_path, judge_, settings, words):
    ours = runs('ours', 'policy')
    runs('model', 'sft'), runs('reward', 'reward')
    place = judge_ if '://' in judge_ else ','.join(f'{tmp_path}/{name}' for name in judge_.split(','))
    with pytest.raises(UserError, match=words):
        judge.run(of_run({'ours': ROWS, 'anchor': ROWS}), ours, 'sft', place, None, **settings)
