r"""AndroidControl as text: people's demonstrations on Android phones, one example a step.

Registers android_control_{sft,pairs,thumbs,prompts}. A prompt (ours: the paper gives none) is

    goal: ..\ndid: {action}\n ..\nstep: ..\nscreen:\n..\naction:

with what was done before, the step's instruction and the screen's elements; an answer is a space and an action as JSON.

    ANDROID_CONTROL_SOURCE    the TFRecords with their splits.json (files.py), or rows of episode_id, goal,
                              step_instructions [N], accessibility_trees [N or N + 1] as text, actions [N]: objects or
                              JSON text; and split, if they are divided

The data has right actions only, and the paper does not say where its wrong ones are from. Ours are another step's
action in the same episode, drawn once and for all; a step of an episode that has no other action makes no pair and no
thumb down. `group` is the episode.
"""

import dataclasses
import json
import random
from collections.abc import Iterator, Mapping

from perl_jax.tasks import registration, sources
from perl_jax.tasks.android_control import files


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: the prompt, the action that was taken, and one that was not or None."""

    inputs: str
    right: str
    wrong: str | None


@dataclasses.dataclass(frozen=True)
class Episode:
    """One demonstration."""

    group: str
    steps: tuple[Step, ...]


def read(row: Mapping) -> Episode:
    """The steps of an episode. Raises ValueError where its lists do not fit together or an action is no JSON object."""
    group, goal, instructions, screens = (
        row[key] for key in ('episode_id', 'goal', 'step_instructions', 'accessibility_trees')
    )
    actions = [_action(action) for action in row['actions']]
    if not actions or len(instructions) != len(actions) or len(screens) - len(actions) not in (0, 1):
        raise ValueError(f'{len(actions)} actions, {len(instructions)} instructions and {len(screens)} screens')
    rng = random.Random(f'android_control {group}')
    steps = []
    for i, (right, instruction, screen) in enumerate(zip(actions, instructions, screens)):
        did = ''.join(f'did: {action}\n' for action in actions[:i])
        inputs = f'goal: {goal.strip()}\n{did}step: {instruction.strip()}\nscreen:\n{screen.strip()}\naction:'
        others = sorted(set(actions) - {right})
        steps.append(Step(inputs, f' {right}', f' {rng.choice(others)}' if others else None))
    return Episode(str(group), tuple(steps))


def sft(split: str) -> Iterator[dict]:
    """Every step with its action."""
    for group, step in _steps(split):
        yield {'inputs': step.inputs, 'targets': step.right, 'group': group}


def pairs(split: str) -> Iterator[dict]:
    """Every step's action against another one."""
    for group, step in _steps(split):
        if step.wrong:
            yield {'inputs': step.inputs, 'chosen': step.right, 'rejected': step.wrong, 'group': group}


def thumbs(split: str) -> Iterator[dict]:
    """Every step's action with a thumb up, and another one with a thumb down."""
    for group, step in _steps(split):
        for targets, label in ((step.right, 1.0), (step.wrong, 0.0)):
            if targets:
                yield {'inputs': step.inputs, 'targets': targets, 'label': label, 'group': group}


def prompts(split: str) -> Iterator[dict]:
    """Every step; `reference` is its action."""
    for group, step in _steps(split):
        yield {'inputs': step.inputs, 'reference': step.right.strip(), 'group': group}


def _steps(split: str) -> Iterator[tuple[str, Step]]:
    return ((episode.group, step) for episode in SOURCE.rows(split) for step in episode.steps)


def _action(action: str | Mapping) -> str:
    action = json.loads(action) if isinstance(action, str) else action
    if not isinstance(action, Mapping) or 'action_type' not in action:
        raise ValueError(f'{action!r} is not an object with action_type')
    # Parquet fills up what an action has not; one order makes equal actions equal texts.
    return json.dumps({key: action[key] for key in sorted(action) if action[key] is not None}, ensure_ascii=False)


SOURCE = sources.Source(
    'ANDROID_CONTROL_SOURCE',
    None,
    'set it to a folder with the files of gs://gresearch/android_control (docs/reference/tasks.md)',
    read,
    files=(('android_control-*-of-*', files.episodes),),
)
for _kind in (sft, pairs, thumbs, prompts):
    registration.add(f'android_control_{_kind.__name__}', _kind.__name__, _kind)
