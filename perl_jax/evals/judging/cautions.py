"""Warnings about a judge's figures: too many unreadable replies, or a policy that was trained on the judging reward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perl_jax.runs import lineage, rundir

UNREAD = 0.05  # the share of unreadable replies above which a warning is given
REWARD = 'train_policy.train.reward'  # `run_function`'s name of a policy's reward sources, a list for each start


def unread_replies(replies: Sequence[str], verdicts: Sequence[int | str | None], consequence: str) -> list[str]:
    """Return a warning if more than the share UNREAD of the replies could not be read, else nothing.

    Args:
      replies: all replies.
      verdicts: the verdict read from each; None is unreadable.
      consequence: how the unreadable ones are counted, for the message.
    """
    unread = [text for text, verdict in zip(replies, verdicts, strict=True) if verdict is None]
    if len(unread) <= UNREAD * len(replies):
        return []
    return [
        f'CAUTION: {len(unread)} of {len(replies)} replies of the judge ({len(unread) / len(replies):.0%}) '
        f'could not be read and {consequence}: the figures are unreliable; the first is {unread[0][:80]!r}. Use '
        'a judge that follows instructions, or raise --judge_tokens if its replies are truncated'
    ]


def same_reward(
    run_function: Callable[[str, str], Callable[..., Any]], model_dirs: Iterable[str], judge_dirs: Sequence[str]
) -> list[str]:
    """Return a warning for each run that was trained on one of the rewards that judge it, alone or in an ensemble.

    Args:
      run_function: see judge.py.
      model_dirs: the runs whose answers are judged.
      judge_dirs: MODEL_DIRs of the judging rewards.
    """
    judge_dirs, cautions = [member for folder in judge_dirs for member in _members(folder)], []
    for model_dir in model_dirs:
        reward_dirs = _training_rewards(run_function, model_dir)
        about = rundir.read(model_dir) or {}
        identities = {*(about.get('rewards') or ()), *lineage.rewards(reward_dirs)}
        if shared := [
            judge_dir
            for judge_dir in judge_dirs
            if identities.intersection(lineage.rewards([judge_dir]))
            or any(_is_same_folder(judge_dir, reward_dir) for reward_dir in reward_dirs)
        ]:
            cautions.append(
                f"CAUTION: '{model_dir}' was trained on the reward '{shared[0]}' that judges it: its win rate "
                'measures how well it exploits this reward, not how good its answers are. Use another judge: a reward '
                'trained on other data with another seed, a language model, or `eval` with METRIC_FNS'
            )
        elif 'rewards' not in about and (missing := [x for x in reward_dirs if rundir.read(x) is None]):
            cautions.append(
                f"CAUTION: '{model_dir}' was trained on the reward '{missing[0]}', which is no longer there, so that "
                'it cannot be told whether this reward judges it. Make sure that it does not'
            )
    return cautions


def _training_rewards(run_function: Callable[[str, str], Callable[..., Any]], model_dir: str) -> list[str]:
    """List the rewards that a policy was trained on, and those of the policies that it started from."""
    reward_dirs, folder = [], model_dir
    while '://' not in folder and (about := rundir.read(folder)) is not None:
        if about['phase'] == 'policy' and (averaged_dirs := _averaged(about)):
            reward_dirs += [
                reward_dir for member_dir in averaged_dirs for reward_dir in _training_rewards(run_function, member_dir)
            ]
        elif about['phase'] == 'policy' and 'imported' not in about:
            for reward_source in [source for start in run_function(folder, REWARD)() for source in start or []]:
                source_dirs = getattr(reward_source, 'model_dir', None) or []
                reward_dirs += [source_dirs] if isinstance(source_dirs, str) else source_dirs
        folder = about['base']['path']
    return [member_dir for folder in reward_dirs for member_dir in _members(folder)]


def _members(folder: str) -> list[str]:
    """List a reward and, if it is a weight average, the rewards that were averaged."""
    return [
        folder,
        *(member_dir for averaged_dir in _averaged(rundir.read(folder) or {}) for member_dir in _members(averaged_dir)),
    ]


def _averaged(about: dict[str, Any]) -> list[str]:
    source = str(about.get('imported', ''))
    return source.removeprefix(rundir.AVERAGE).split(', ') if source.startswith(rundir.AVERAGE) else []


def _is_same_folder(path: str, other_path: str) -> bool:
    """Tell whether two paths are one folder, also if the other one is relative to another working folder."""
    if os.path.realpath(path) == os.path.realpath(other_path):
        return True
    is_there = rundir.read(other_path) is not None
    is_relative = not is_there and not os.path.isabs(other_path)
    return is_relative and os.path.realpath(path).endswith(os.sep + os.path.normpath(other_path))
