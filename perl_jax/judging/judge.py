"""`perl_jax judge`: a run's answers against another's, or by themselves, before a judge.

The answers of each run, and a judge that is a run, come of `of_run(model_dir, name)`: the function `name` under that
run's own configuration, which is what main.py knows to read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from perl_jax import evaluate, rewards, rundir
from perl_jax.errors import UserError
from perl_jax.judging import reading, rubrics, winrate
from perl_jax.judging.endpoint import Endpoint
from perl_jax.judging.mentions import HARM, ORDER

FLAGS: dict[str, dict[str, Any]] = {
    '--model_dir': {'required': True, 'help': 'MODEL_DIR of the run whose answers are judged'},
    '--against': {'help': 'another MODEL_DIR; sft, what a policy started from; or reference, of the task'},
    '--judge': {'required': True, 'help': 'MODEL_DIR of a reward or of a model to ask, or http://HOST/v1'},
    '--rubric': {'help': 'summarization, helpful, harmless, or your module.function'},
    '--split': {'default': 'validation'},
    '--num': {'type': int, 'help': 'how many prompts; default: all'},
    '--group': {'help': 'a field of the examples: its rows are drawn together for the intervals'},
    '--judge_model': {'help': 'what the endpoint calls its model'},
    '--judge_key': {'help': 'the environment variable that holds its key'},
    '--judge_chat': {'choices': ('chatml', 'llama3', 'gemma', 'own'), 'help': 'the prompt format of a run to ask'},
    '--judge_vocabulary': {'help': 'its tokenizer, if not the one it was trained with'},
    '--judge_timeout': {'dest': 'timeout', 'type': float, 'default': 60.0, 'help': 'seconds'},
    '--judge_retries': {'dest': 'retries', 'type': int, 'default': 5},
    '--judge_concurrency': {'dest': 'concurrency', 'type': int, 'default': 8, 'help': 'requests at a time'},
    '--judge_tokens': {'dest': 'max_tokens', 'type': int, 'default': 16, 'help': 'room for its answer'},
}
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
    judge_model: str | None = None,
    judge_key: str | None = None,
    judge_chat: str | None = None,
    judge_vocabulary: str | None = None,
    **endpoint: Any,
) -> dict[str, Any]:
    """Judge a split, print the figures with their 95% intervals, and write them and every verdict into MODEL_DIR.

    Args:
      against: another MODEL_DIR of the same task, 'sft' (what a policy started from) or 'reference' (the task's own
        answers). None with the rubric 'harmless', which looks at one answer.
      judge: the MODEL_DIR of a reward (which needs no rubric) or of a model to ask, or the URL of an endpoint, whose
        model is `judge_model` and whose key is in the environment variable `judge_key`; `endpoint` has more settings.
        `judge_chat` and `judge_vocabulary` are for a model to ask (judging/models.py).
      rubric: 'summarization', 'helpful', 'harmless', or the dotted name of a function (rubrics.py).
      group: the field of the examples that are drawn together in the bootstrap.
    """
    scores = not _is_url(judge) and _phase(judge, '--judge') == 'reward'
    if scores == bool(rubric):
        raise UserError(f'judge: {"a reward judges without --rubric" if rubric else "give --rubric, such as helpful"}')
    if (rubric == 'harmless') == bool(against):
        raise UserError('judge: give --against=MODEL_DIR, sft or reference, but none with --rubric=harmless')
    form = None if rubric in (None, 'harmless') else rubrics.PAIRWISE.get(rubric) or rewards.function(rubric)
    ask: Ask | None = None
    if _is_url(judge):
        ask = _endpoint(judge, judge_model, judge_key, os.path.join(model_dir, 'judge.sqlite'), endpoint)
    elif not scores:
        words = {'chat': judge_chat, 'vocabulary': judge_vocabulary}
        ask = lambda prompts: of_run(judge, 'judging.models.ask')(prompts, model_dir=judge, **words)  # noqa: E731
    rows = _rows(of_run, model_dir, against, {'split': split, 'num': num, 'group': group})

    if scores:
        both = [(row['response'], row['other']) for row in rows]
        values = of_run(judge, 'judging.models.score')([row['prompt'] for row in rows], both, model_dir=judge)
        for row, (ours, theirs) in zip(rows, np.asarray(values, np.float64).tolist()):
            row |= {'score': ours, 'other_score': theirs, 'credit': (1 + np.sign(ours - theirs)) / 2}
    elif rubric == 'harmless':
        _harm(ask, rows)
    else:
        _compare(ask, form, rows)

    result = evaluate.with_intervals(lambda index: measure([rows[i] for i in index]), [row['group'] for row in rows])
    about = {'split': split, 'rubric': rubric, 'judge': judge, 'judge_model': judge_model, 'against': against}
    return _report(os.path.join(model_dir, f'judge_{split}_{rubric or "reward"}'), about, rows, result)


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


def _compare(ask: Ask, form: Callable[[str, str, str], str], rows: list[dict[str, Any]]) -> None:
    """Both orders of every pair."""
    forward = [form(row['prompt'], row['response'], row['other']) for row in rows]
    backward = [form(row['prompt'], row['other'], row['response']) for row in rows]
    said = ask(forward + backward)
    verdicts = _read(said, ORDER)
    first, second = verdicts[: len(rows)], verdicts[len(rows) :]
    for i, (row, credit) in enumerate(zip(rows, winrate.credits(first, second).tolist())):
        row |= {'said': [said[i], said[i + len(rows)]], 'verdicts': [first[i], second[i]], 'credit': credit}


def _harm(ask: Ask, rows: list[dict[str, Any]]) -> None:
    said = ask([rubrics.harmless(row['prompt'], row['response']) for row in rows])
    for row, text, verdict in zip(rows, said, _read(said, HARM)):
        row |= {'said': [text], 'verdicts': [verdict]}


def _read(said: list[str], choices: tuple[str, ...]) -> list[int | str | None]:
    verdicts = [reading.read(text, choices) for text in said]
    if all(verdict is None for verdict in verdicts):
        raise UserError(
            f'--judge: no answer names {" or ".join(choices)}; the first is {said[0][:60]!r}. Take a judge that '
            'follows instructions, or raise --judge_tokens'
        )
    return verdicts


def _endpoint(url: str, model: str | None, key: str | None, cache: str, settings: dict[str, Any]) -> Ask:
    if model is None:
        raise UserError('judge: give --judge_model, the name that the endpoint knows the model by')
    if key is not None and not os.environ.get(key):
        raise UserError(f'--judge_key: the environment variable {key} is not set; put the key into it')
    return Endpoint(url, model, cache, key and os.environ[key], **settings).ask


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
        rows = [row | {'other': row['reference']} for row in rows if row.get('reference')]
        if not rows:
            raise UserError("--against=reference: no example of the task has a 'reference'; name a MODEL_DIR or sft")
        return rows
    others = answers(model_dir, anchor=True) if against == 'sft' else answers(against)
    if [row['prompt'] for row in rows] != [row['prompt'] for row in others]:
        raise UserError(f"--against: '{against}' answers other prompts than '{model_dir}'; name a run of the same task")
    return [row | {'other': other['response']} for row, other in zip(rows, others)]


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
    rundir.replace(f'{path}.jsonl', ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))
    figures = {k: {'value': v[0], 'low': v[1], 'high': v[2]} for k, v in result.items()}
    rundir.replace(f'{path}.json', json.dumps(about | {'answers': len(rows), 'metrics': figures}, indent=2) + '\n')
    print(f'{path}.json')
    return result
