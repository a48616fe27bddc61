"""When a judge's figures are not what they seem: replies that were not read, a reward that the policy learned from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perl_jax.runs import rundir

UNREAD = 0.05  # of all replies; more is said
REWARD = 'train_policy.train.reward'  # what `of_run` calls a policy's sources of reward


def unread(said: Sequence[str], verdicts: Sequence[int | str | None], become: str) -> list[str]:
    """A line where more than UNREAD of the replies could not be read.

    Args:
      said: all replies.
      verdicts: what was read of each.
      become: what happens to those that could not be.
    """
    missed = [text for text, verdict in zip(said, verdicts, strict=True) if verdict is None]
    if len(missed) <= UNREAD * len(said):
        return []
    return [
        f'CAUTION: {len(missed)} of {len(said)} replies of the judge ({len(missed) / len(said):.0%}) could not be read '
        f'and {become}: the figures say little; the first is {missed[0][:80]!r}. Take a judge that follows '
        'instructions, or raise --judge_tokens if its replies are cut'
    ]


def same_reward(
    of_run: Callable[[str, str], Callable[..., Any]], model_dirs: Iterable[str], judges: Sequence[str]
) -> list[str]:
    """A line for each run that learned from one of the rewards that now judge it, by itself or within an ensemble.

    Args:
      of_run: see judge.py.
      model_dirs: the runs whose answers are judged.
      judges: MODEL_DIRs of the rewards.
    """
    judges, lines = [member for folder in judges for member in _members(folder)], []
    for model_dir in model_dirs:
        learned = _learned_from(of_run, model_dir)
        if both := [judge for judge in judges if any(_same(judge, reward) for reward in learned)]:
            lines.append(
                f"CAUTION: '{model_dir}' was trained on the reward '{both[0]}' that judges it: its win rate says how "
                'well it pleases this reward, not how good its answers are. Judge by another: a reward of other data '
                'and another seed, a model to ask, or `eval` with METRIC_FNS'
            )
    return lines


def _learned_from(of_run: Callable[[str, str], Callable[..., Any]], model_dir: str) -> list[str]:
    """The rewards of a policy, and of those that it started from."""
    found, folder = [], model_dir
    while '://' not in folder and (about := rundir.read(folder)) is not None:
        if about['phase'] == 'policy' and (average := _averaged(about)):
            found += [reward for member in average for reward in _learned_from(of_run, member)]
        elif about['phase'] == 'policy' and 'imported' not in about:
            for source in of_run(folder, REWARD)() or []:
                folders = getattr(source, 'model_dir', None) or []
                found += [folders] if isinstance(folders, str) else folders
        folder = about['base']['path']
    return [member for folder in found for member in _members(folder)]


def _members(folder: str) -> list[str]:
    """A reward, and those that it is the average of."""
    return [folder, *(member for each in _averaged(rundir.read(folder) or {}) for member in _members(each))]


def _averaged(about: dict[str, Any]) -> list[str]:
    source = str(about.get('imported', ''))
    return source.removeprefix(rundir.AVERAGE).split(', ') if source.startswith(rundir.AVERAGE) else []


def _same(here: str, there: str) -> bool:
    """Whether two paths are one run: the same folder, a copy of it, or a relative path of another working folder."""
    if os.path.realpath(here) == os.path.realpath(there):
        return True
    one, other = (rundir.read(folder) for folder in (here, there))
    if one is not None and other is not None:
        return one == other and 'started' in one
    return not os.path.isabs(there) and os.path.realpath(here).endswith(os.sep + os.path.normpath(there))
