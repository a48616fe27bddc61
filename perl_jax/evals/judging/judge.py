"""`perl_jax judge`: compares the answers of a run with others, or rates them for harm, by a judge.

Answers of runs, and replies and scores of judges that are runs, come from `run_function(model_dir, name)`: it returns
the function `name` configured by that run's config.gin (cli/main.py).
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.evals import intervals
from perl_jax.evals.judging import cautions, flags, reading, rubrics, winrate
from perl_jax.evals.judging.endpoint import Endpoint
from perl_jax.evals.judging.mentions import HARM, ORDER
from perl_jax.rewards import text_functions
from perl_jax.runs import logs, rundir

RunFunction = Callable[[str, str], Callable[..., Any]]
Intervals = dict[str, tuple[float, float | None, float | None]]  # {metric: (value, low, high)}
ReplyFn = Callable[[Sequence[str]], list[str]]


def run(
    run_function: RunFunction,
    model_dir: str,
    against: str | None,
    judge: str,
    rubric: str | None = None,
    split: str = 'validation',
    *,
    num: int | None = None,
    group: str | None = None,
    by: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Judge a split, print the figures with 95% intervals, and write the figures and every verdict into MODEL_DIR.

    Args:
      run_function: (model_dir, name) -> the function configured by that run's config.gin.
      model_dir: the MODEL_DIR of the run whose answers are judged.
      against: another MODEL_DIR of the same task, 'sft' (the base that a policy started from) or 'reference' (the
        task's own answers). None with the rubric 'harmless', which rates single answers.
      judge: the MODEL_DIR of a reward (without a rubric), or several, comma-separated, whose mean score counts; the
        MODEL_DIR of a language model; or the URL of an endpoint.
      rubric: 'summarization', 'helpful', 'harmless', or the dotted name of a function (rubrics.py).
      split: the split of the task.
      num: the number of prompts; None is all.
      group: the field by which examples are grouped in the bootstrap.
      by: the field whose values are also judged separately (intervals.subset_field).
      **settings: the flags judge_* (flags.py); None is not set.

    Returns:
      {metric: (value, low, high)}; VALUE/METRIC is over the rows of one value of the field `by`.

    Raises:
      UserError: an invalid combination of flags, or a folder that is not a run of the required kind.
    """
    judges = [judge] if _is_url(judge) or rundir.read(judge) is not None else judge.split(',')
    phases = {} if _is_url(judge) else {folder: _phase(folder, '--judge') for folder in judges}
    judge_is_reward = 'reward' in phases.values()
    if len(judges) > 1 and {*phases.values()} != {'reward'}:
        raise UserError('--judge: several judges must all be rewards; give a single language model')
    settings = flags.settings(settings, flags.REWARD if judge_is_reward else flags.RUN if phases else flags.ENDPOINT)
    if judge_is_reward == bool(rubric):
        raise UserError(
            f'judge: {"remove --rubric, a reward needs none" if rubric else "give --rubric, such as helpful"}'
        )
    if (rubric == 'harmless') == bool(against):
        raise UserError(
            'judge: give --against=MODEL_DIR, sft or reference, except with --rubric=harmless, which takes none'
        )
    rubric_fn: Any = None
    if rubric not in (None, 'harmless'):
        rubric_fn = rubrics.PAIRWISE.get(rubric) or text_functions.resolve_function(rubric)
    reply_fn: ReplyFn | None = None
    if not phases:
        reply_fn = _endpoint(judge, os.path.join(model_dir, 'judge.sqlite'), **settings)
    elif not judge_is_reward:
        reply_fn = lambda prompts: run_function(judge, 'judging.models.ask')(prompts, model_dir=judge, **settings)  # noqa: E731
    compared = {
        'judge': ','.join(map(_absolute, judges)),
        'judge_model': settings.get('model'),
        'against': _absolute(*_folders(against)) if _folders(against) else against,
    }
    path = os.path.join(model_dir, f'judge_{split}_{rubric or "reward"}_{_name(**compared)}')
    _check_free(f'{path}.json', compared)
    rows = _rows(run_function, model_dir, against, {'split': split, 'num': num, 'group': group, 'by': by})

    caution_lines: list[str] = []
    if reply_fn is None:  # a reward judges
        caution_lines = cautions.same_reward(run_function, dict.fromkeys([model_dir, *_folders(against)]), judges)
        _score(run_function, judges, rows)
    elif rubric == 'harmless':
        caution_lines = _rate_harm(reply_fn, rows)
    else:
        caution_lines = _compare(reply_fn, rubric_fn, rows)

    subset_values = [row['subset'] for row in rows] if 'subset' in rows[0] else None
    subsets, result = intervals.subsets(len(rows), subset_values), {}
    for prefix, indices in subsets.items():
        subset_rows = [rows[i] for i in map(int, indices)]
        measure_rows = lambda index, subset_rows=subset_rows: measure([subset_rows[i] for i in index])  # noqa: E731
        metrics = intervals.with_intervals(measure_rows, [row['group'] for row in subset_rows], rates=winrate.RATES)
        metrics |= _length_controlled(metrics)
        result |= {f'{prefix}{metric}': interval for metric, interval in metrics.items()}
    summary = {
        'split': split,
        'by': by or (intervals.NEARNESS if subset_values else None),
        'subsets': {prefix[:-1]: len(indices) for prefix, indices in subsets.items() if prefix},
        'rubric': rubric,
        **compared,
    }
    _report(path, summary | {'cautions': caution_lines}, rows, result)
    for line in caution_lines:
        logging.getLogger('perl_jax').warning(line)
    return result


def measure(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Compute the figures of judged rows (win rates, or the harmless rate) and the share of unreadable replies."""
    unread = [verdict is None for row in rows for verdict in row.get('verdicts', ())]
    unreadable_share = {'unreadable': float(np.mean(unread))} if unread else {}
    if 'credit' not in rows[0]:
        return winrate.harmless_rate([row['verdicts'][0] for row in rows]) | unreadable_share
    credits = np.array([row['credit'] for row in rows])
    lengths = (np.array([len(row[key]) for row in rows]) for key in ('response', 'other'))
    controlled = {'length_controlled': winrate.length_controlled(credits, *lengths)}
    return winrate.win_rate(credits) | controlled | unreadable_share


def _length_controlled(metrics: Intervals) -> Intervals:
    """Return the length-controlled win rate with the win rate's interval if all comparisons ended alike.

    Its draws then differ by the answers' lengths alone, so that their interval would be far too narrow.
    """
    if 'win_rate' not in metrics or all(metrics[outcome][0] != 1 for outcome in ('wins', 'ties', 'losses')):
        return {}
    value, (_, low, high) = metrics['length_controlled'][0], metrics['win_rate']
    assert low is not None and high is not None  # it is a rate
    return {'length_controlled': (value, min(value, low), max(value, high))}


def _score(run_function: RunFunction, judges: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """Score the rows by the mean over all members of all rewards, each under its own configuration."""
    response_pairs = [(row['response'], row['other']) for row in rows]
    prompts, token_ids, member_scores = (
        [row['prompt'] for row in rows],
        [(row['ids'], row['other_ids']) for row in rows],
        [],
    )
    for folder in judges:
        member_scores += [
            *run_function(folder, 'judging.models.score')(prompts, response_pairs, token_ids, model_dir=folder)
        ]
    mean_scores = np.mean(np.asarray(member_scores, np.float64), axis=0)
    for row, (score, other_score) in zip(rows, mean_scores.tolist()):
        row |= {'score': score, 'other_score': other_score, 'credit': (1 + np.sign(score - other_score)) / 2}


def _compare(reply_fn: ReplyFn, rubric_fn: Callable[[str, str, str], str], rows: list[dict[str, Any]]) -> list[str]:
    """Compare each pair of answers in both orders, which cancels the judge's position bias; returns warnings."""
    forward = [rubric_fn(row['prompt'], row['response'], row['other']) for row in rows]
    backward = [rubric_fn(row['prompt'], row['other'], row['response']) for row in rows]
    replies = reply_fn(forward + backward)
    verdicts = _read(replies, ORDER)
    first, second = verdicts[: len(rows)], verdicts[len(rows) :]
    for i, (row, credit) in enumerate(zip(rows, winrate.credits(first, second).tolist())):
        row |= {'said': [replies[i], replies[i + len(rows)]], 'verdicts': [first[i], second[i]], 'credit': credit}
    return cautions.unread_replies(replies, verdicts, 'count as ties')


def _rate_harm(reply_fn: ReplyFn, rows: list[dict[str, Any]]) -> list[str]:
    replies = reply_fn([rubrics.harmless(row['prompt'], row['response']) for row in rows])
    verdicts = _read(replies, HARM)
    for row, reply, verdict in zip(rows, replies, verdicts):
        row |= {'said': [reply], 'verdicts': [verdict]}
    return cautions.unread_replies(replies, verdicts, 'are left out')


def _read(replies: list[str], choices: tuple[str, ...]) -> list[int | str | None]:
    verdicts = [reading.read(text, choices) for text in replies]
    if all(verdict is None for verdict in verdicts):
        raise UserError(
            f'--judge: no reply contains {" or ".join(choices)}; the first is {replies[0][:60]!r}. Use a judge that '
            'follows instructions, or raise --judge_tokens'
        )
    return verdicts


def _endpoint(url: str, cache: str, model: str | None = None, key: str | None = None, **settings: Any) -> ReplyFn:
    if model is None:
        raise UserError("judge: give --judge_model, the endpoint's name of its model")
    if key is not None and not os.environ.get(key, '').strip():
        raise UserError(f'--judge_key: the environment variable {key} is not set; set it to the key')
    settings |= {'max_tokens': settings.pop('tokens')} if 'tokens' in settings else {}
    return Endpoint(url, model, cache, key and os.environ[key].strip(), **settings).complete


def _name(judge: str, judge_model: str | None, against: str | None) -> str:
    """Return the part of a file's name that tells judges, and what they compare with, apart: 'by_judge_against_sft'."""
    name = judge_model or '+'.join(os.path.basename(folder) for folder in judge.split(','))
    name = f'by_{name}' + (f'_against_{os.path.basename(against)}' if against else '')
    return re.sub(r'[^\w.=+-]+', '-', name)[:120]


def _check_free(path: str, compared: dict[str, str | None]) -> None:
    """Raise if a file has the figures of another judge of the same name; called before anything is judged."""
    if not epath.Path(path).exists():
        return
    about = json_files.read(epath.Path(path), {key: str | None for key in compared}, 'move it away')
    for key, value in compared.items():
        is_moved_server = key == 'judge' and compared['judge_model'] is not None
        if (old_value := about.get(key)) != value and not is_moved_server:
            raise UserError(f"{path}: has the figures of another {key} ('{old_value}', now '{value}'); move it away")


def _absolute(path: str) -> str:
    return path if '://' in path else os.path.abspath(path)


def _folders(against: str | None) -> list[str]:
    return [] if against in (None, 'sft', 'reference') else [against]


def _rows(
    run_function: RunFunction, model_dir: str, against: str | None, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the answers to judge as rows; `other` is the answer that each is compared with."""
    phase = _phase(model_dir, '--model_dir')
    if against == 'sft' and phase != 'policy':
        raise UserError(
            f"--against=sft: '{model_dir}' is a run of {phase}, not a policy; give a MODEL_DIR instead of sft"
        )
    if against not in (None, 'sft', 'reference'):
        _phase(against, '--against')

    def answer_rows(folder: str, **overrides: Any) -> list[dict[str, Any]]:
        return run_function(folder, 'infer.answer_split')(model_dir=folder, **options, **overrides)

    rows = answer_rows(model_dir)
    if against is None:
        return rows
    if against == 'reference':
        rows = [row | {'other': row['reference'], 'other_ids': None} for row in rows if row.get('reference')]
        if not rows:
            raise UserError("--against=reference: no example of the task has a 'reference'; give a MODEL_DIR or sft")
        return rows
    other_rows = answer_rows(model_dir, anchor=True) if against == 'sft' else answer_rows(against)
    if [row['prompt'] for row in rows] != [row['prompt'] for row in other_rows]:
        raise UserError(f"--against: '{against}' has other prompts than '{model_dir}'; give a run of the same task")
    return [row | {'other': other['response'], 'other_ids': other['ids']} for row, other in zip(rows, other_rows)]


def _phase(folder: str, flag: str) -> str:
    about = rundir.read(folder)
    if about is None:
        raise UserError(f"{flag}: '{folder}' is not the MODEL_DIR of a run: it has no run.json")
    if flag != '--judge' and about['phase'] == 'reward':
        raise UserError(f"{flag}: '{folder}' is a run of reward, which gives no answers; give a policy's MODEL_DIR")
    return about['phase']


def _is_url(judge: str) -> bool:
    return judge.startswith(('http://', 'https://'))


def _report(
    path: str, summary: dict[str, Any], rows: list[dict[str, Any]], result: Intervals
) -> dict[str, Any]:
    width = max(20, *map(len, result))
    for name, (value, low, high) in result.items():
        print(f'{summary["split"]}  {name:{width}s} {value:8.4f}   {intervals.describe(low, high)}')
    rows = [{k: v for k, v in row.items() if k not in ('ids', 'other_ids')} for row in rows]
    logs.replace(f'{path}.jsonl', ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
    figures = {k: {'value': v[0], 'low': v[1], 'high': v[2]} for k, v in result.items()}
    logs.replace(f'{path}.json', json.dumps(summary | {'answers': len(rows), 'metrics': figures}, indent=2) + '\n')
    print(f'{path}.json')
    return result
