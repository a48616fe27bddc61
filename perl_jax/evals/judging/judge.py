"""`perl_jax judge`: a run's answers against another's, or by themselves, before a judge.

The answers of each run, and a judge that is a run, come of `of_run(model_dir, name)`: the function `name` under that
run's own configuration, which is what main.py knows to read.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from perl_jax.errors import UserError
from perl_jax.evals import intervals
from perl_jax.evals.judging import cautions as caution
from perl_jax.evals.judging import flags, reading, rubrics, winrate
from perl_jax.evals.judging.endpoint import Endpoint
from perl_jax.evals.judging.mentions import HARM, ORDER
from perl_jax.rewards import text_functions
from perl_jax.runs import rundir

OfRun = Callable[[str, str], Callable[..., Any]]
Ask = Callable[[Sequence[str]], list[str]]


def run(
    of_run: OfRun,
    model_dir: str,
    against: str | None,
    judge: str,
    rubric: str | None = None,
    split: str = 'validation',
    num: int | None = None,
    group: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Judge a split, print the figures with their 95% intervals, and write them and every verdict into MODEL_DIR.

    Args:
      against: another MODEL_DIR of the same task, 'sft' (what a policy started from) or 'reference' (the task's own
        answers). None with the rubric 'harmless', which looks at one answer.
      judge: the MODEL_DIR of a reward (which needs no rubric), or several with commas between them, whose mean judges,
        as the mean of an ensemble's members does; the MODEL_DIR of a model to ask; or the URL of an endpoint.
      rubric: 'summarization', 'helpful', 'harmless', or the dotted name of a function (rubrics.py).
      group: the field of the examples that are drawn together in the bootstrap.
      settings: the flags judge_*, None where they are not given; flags.py says whose they are. `judge_model` is what an
        endpoint calls its model, `judge_key` the environment variable that holds its key.

    Raises:
      UserError: a flag that this kind of judge does not read, among others.
    """
    judges = [judge] if _is_url(judge) or rundir.read(judge) is not None else judge.split(',')
    phases = {} if _is_url(judge) else {folder: _phase(folder, '--judge') for folder in judges}
    scores = 'reward' in phases.values()
    if len(judges) > 1 and {*phases.values()} != {'reward'}:
        raise UserError('--judge: several judges have to be rewards, all of them; name one run to ask')
    settings = flags.settings(settings, flags.REWARD if scores else flags.RUN if phases else flags.ENDPOINT)
    if scores == bool(rubric):
        raise UserError(f'judge: {"a reward judges without --rubric" if rubric else "give --rubric, such as helpful"}')
    if (rubric == 'harmless') == bool(against):
        raise UserError('judge: give --against=MODEL_DIR, sft or reference, but none with --rubric=harmless')
    form: Any = None
    if rubric not in (None, 'harmless'):
        form = rubrics.PAIRWISE.get(rubric) or text_functions.function(rubric)
    ask: Ask | None = None
    if not phases:
        ask = _endpoint(judge, os.path.join(model_dir, 'judge.sqlite'), **settings)
    elif not scores:
        ask = lambda prompts: of_run(judge, 'judging.models.ask')(prompts, model_dir=judge, **settings)  # noqa: E731
    rows = _rows(of_run, model_dir, against, {'split': split, 'num': num, 'group': group})

    cautions: list[str] = []
    if ask is None:  # a reward judges
        cautions = caution.same_reward(of_run, dict.fromkeys([model_dir, *_folders(against)]), judges)
        _score(of_run, judges, rows)
    elif rubric == 'harmless':
        cautions = _harm(ask, rows)
    else:
        cautions = _compare(ask, form, rows)

    result = intervals.with_intervals(lambda index: measure([rows[i] for i in index]), [row['group'] for row in rows])
    about = {'split': split, 'rubric': rubric, 'judge': judge, 'judge_model': settings.get('model'), 'against': against}
    path = os.path.join(model_dir, f'judge_{split}_{rubric or "reward"}')
    _report(path, about | {'cautions': cautions}, rows, result)
    for line in cautions:
        logging.getLogger('perl_jax').warning(line)
    return result


def measure(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The figures of judged rows: of their credit, or of their harm; and how many answers of the judge had no sense."""
    unread = [x is None for row in rows for x in row.get('verdicts', ())]
    extra = {'unreadable': float(np.mean(unread))} if unread else {}
    if 'credit' not in rows[0]:
        return winrate.harmless_rate([row['verdicts'][0] for row in rows]) | extra
    credits = np.array([row['credit'] for row in rows])
    lengths = (np.array([len(row[key]) for row in rows]) for key in ('response', 'other'))
    controlled = {'length_controlled': winrate.length_controlled(credits, *lengths)}
    return winrate.win_rate(credits) | controlled | extra


def _score(of_run: OfRun, judges: Sequence[str], rows: list[dict[str, Any]]) -> None:
    """The mean of all members of all rewards, each under its own configuration."""
    both = [(row['response'], row['other']) for row in rows]
    prompts, ids, members = [row['prompt'] for row in rows], [(row['ids'], row['other_ids']) for row in rows], []
    for folder in judges:
        members += [*of_run(folder, 'judging.models.score')(prompts, both, ids, model_dir=folder)]
    values = np.mean(np.asarray(members, np.float64), axis=0)
    for row, (ours, theirs) in zip(rows, values.tolist()):
        row |= {'score': ours, 'other_score': theirs, 'credit': (1 + np.sign(ours - theirs)) / 2}


def _compare(ask: Ask, form: Callable[[str, str, str], str], rows: list[dict[str, Any]]) -> list[str]:
    """Both orders of every pair; gives what is to be said of the replies."""
    forward = [form(row['prompt'], row['response'], row['other']) for row in rows]
    backward = [form(row['prompt'], row['other'], row['response']) for row in rows]
    said = ask(forward + backward)
    verdicts = _read(said, ORDER)
    first, second = verdicts[: len(rows)], verdicts[len(rows) :]
    for i, (row, credit) in enumerate(zip(rows, winrate.credits(first, second).tolist())):
        row |= {'said': [said[i], said[i + len(rows)]], 'verdicts': [first[i], second[i]], 'credit': credit}
    return caution.unread(said, verdicts, 'count as ties')


def _harm(ask: Ask, rows: list[dict[str, Any]]) -> list[str]:
    said = ask([rubrics.harmless(row['prompt'], row['response']) for row in rows])
    verdicts = _read(said, HARM)
    for row, text, verdict in zip(rows, said, verdicts):
        row |= {'said': [text], 'verdicts': [verdict]}
    return caution.unread(said, verdicts, 'are left out')


def _read(said: list[str], choices: tuple[str, ...]) -> list[int | str | None]:
    verdicts = [reading.read(text, choices) for text in said]
    if all(verdict is None for verdict in verdicts):
        raise UserError(
            f'--judge: no answer names {" or ".join(choices)}; the first is {said[0][:60]!r}. Take a judge that '
            'follows instructions, or raise --judge_tokens'
        )
    return verdicts


def _endpoint(url: str, cache: str, model: str | None = None, key: str | None = None, **settings: Any) -> Ask:
    if model is None:
        raise UserError('judge: give --judge_model, the name that the endpoint knows the model by')
    if key is not None and not os.environ.get(key):
        raise UserError(f'--judge_key: the environment variable {key} is not set; put the key into it')
    settings |= {'max_tokens': settings.pop('tokens')} if 'tokens' in settings else {}
    return Endpoint(url, model, cache, key and os.environ[key], **settings).ask


def _folders(against: str | None) -> list[str]:
    return [] if against in (None, 'sft', 'reference') else [against]


def _rows(of_run: OfRun, model_dir: str, against: str | None, what: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to judge; `other` is what each is compared with."""
    phase = _phase(model_dir, '--model_dir')
    if against == 'sft' and phase != 'policy':
        raise UserError(f"--against=sft: '{model_dir}' is a run of {phase}, not a policy; name a MODEL_DIR")
    if against not in (None, 'sft', 'reference'):
        _phase(against, '--against')
    answers = lambda folder, **more: of_run(folder, 'infer.answer_split')(model_dir=folder, **what, **more)  # noqa: E731
    rows = answers(model_dir)
    if against is None:
        return rows
    if against == 'reference':
        rows = [row | {'other': row['reference'], 'other_ids': None} for row in rows if row.get('reference')]
        if not rows:
            raise UserError("--against=reference: no example of the task has a 'reference'; name a MODEL_DIR or sft")
        return rows
    others = answers(model_dir, anchor=True) if against == 'sft' else answers(against)
    if [row['prompt'] for row in rows] != [row['prompt'] for row in others]:
        raise UserError(f"--against: '{against}' answers other prompts than '{model_dir}'; name a run of the same task")
    return [row | {'other': other['response'], 'other_ids': other['ids']} for row, other in zip(rows, others)]


def _phase(folder: str, flag: str) -> str:
    about = rundir.read(folder)
    if about is None:
        raise UserError(f"{flag}: '{folder}' is not the MODEL_DIR of a run: it has no run.json")
    if flag != '--judge' and about['phase'] == 'reward':
        raise UserError(f"{flag}: '{folder}' is a run of reward, which gives no answers; name a policy's")
    return about['phase']


def _is_url(judge: str) -> bool:
    return judge.startswith(('http://', 'https://'))


def _report(
    path: str, about: dict[str, Any], rows: list[dict[str, Any]], result: dict[str, tuple[float, float, float]]
) -> dict[str, Any]:
    for name, (value, low, high) in result.items():
        print(f'{about["split"]}  {name:20s} {value:8.4f}   95% [{low:.4f}, {high:.4f}]')
    rows = [{k: v for k, v in row.items() if k not in ('ids', 'other_ids')} for row in rows]
    rundir.replace(f'{path}.jsonl', ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
    figures = {k: {'value': v[0], 'low': v[1], 'high': v[2]} for k, v in result.items()}
    rundir.replace(f'{path}.json', json.dumps(about | {'answers': len(rows), 'metrics': figures}, indent=2) + '\n')
    print(f'{path}.json')
    return result
