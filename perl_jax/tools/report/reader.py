"""Reads the folders of runs for the report, however unfinished they are.

A run's folder holds metrics.jsonl (required), and run.json, config.gin and samples.jsonl (each may be missing). A run
in progress may end in half a line; one that was killed and resumed may hold half a line in the middle and a step twice.
"""

import dataclasses
import json
import math
import os
import re

import numpy as np

from perl_jax.errors import UserError

PHASES = ('sft', 'reward', 'policy')
HOLDS = 'metrics.jsonl, run.json, config.gin, samples.jsonl'


@dataclasses.dataclass(frozen=True)
class Run:
    """One run as it was found on disk.

    label: the folder relative to the parent that all runs share. info: run.json, {} if missing. steps: {step: {key:
    finite float}}, ascending. samples: rows of samples.jsonl. config: {gin key: value text}. config_text: config.gin,
    '' if missing. broken: lines that could not be read, half a line at the end aside.
    """

    folder: str
    label: str
    info: dict
    steps: dict
    phase: str
    samples: list
    config: dict
    config_text: str
    broken: int

    @property
    def tuning(self) -> str:
        """'lora', 'full' or '' if run.json does not say."""
        return str(self.info.get('tuning') or '')

    @property
    def running(self) -> bool:
        """True if run.json has no time of finish."""
        return bool(self.info) and not self.info.get('finished')

    @property
    def keys(self) -> list[str]:
        """The metric names in the order in which the file first gives them."""
        return list(dict.fromkeys(key for row in self.steps.values() for key in row))

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps that logged `key` and its values: two float64 arrays of one length, empty if there are none."""
        points = [(step, row[key]) for step, row in self.steps.items() if key in row]
        steps, values = zip(*points) if points else ((), ())
        return np.asarray(steps, float), np.asarray(values, float)

    def last_samples(self) -> tuple[int, list[dict]]:
        """The last sampled step and its rows, in the file's order."""
        last = max((_step(row) for row in self.samples), default=0)
        return last, [row for row in self.samples if _step(row) == last]


def read(folders: list[str]) -> list[Run]:
    """Reads every folder once, ordered by phase (SFT, reward, policy) and else as given.

    Raises: UserError if there is no folder, if one is not a run's, or if its metrics are empty.
    """
    folders = list(dict.fromkeys(os.path.abspath(folder) for folder in folders))
    if not folders:
        raise UserError(f"report needs at least one run's folder, one that holds {HOLDS}")
    parent = common_parent(folders)
    runs = [_read_run(folder, _label(folder, parent)) for folder in folders]
    known = {phase: place for place, phase in enumerate(PHASES)}
    return sorted(runs, key=lambda run: known.get(run.phase, len(PHASES)))


def common_parent(folders: list[str]) -> str:
    """The deepest folder above all of these; of one folder, or of a folder and its own sub-folder, the one above it."""
    parent = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    inside = parent in [os.path.abspath(folder) for folder in folders]
    return os.path.dirname(parent) if inside else parent


def gin_values(text: str) -> dict[str, str]:
    """The assignments of a gin file, {key: value text in one line}; comments, imports and includes are left out."""
    values, key = {}, None
    for line in text.splitlines():
        start = re.match(r'([\w./-]+)\s*=\s*(.*)', line)
        if start:
            key, line = start.groups()
            values[key] = ''
        elif not re.match(r'[\s\])}]', line):  # a value goes on in indented lines, or in the bracket that closes it
            key = None
        if key:
            values[key] += ' ' + line.strip().removesuffix('\\')
    return {key: re.sub(r'\s+', ' ', value).strip() for key, value in values.items()}


def _label(folder, parent):
    return os.path.relpath(folder, parent).replace(os.sep, '/')


def _read_run(folder, label):
    path = os.path.join(folder, 'metrics.jsonl')
    if not os.path.isfile(path):
        raise UserError(_not_a_run(folder))
    rows, broken = _json_lines(path)
    steps = {}
    for row in rows:
        if _finite(row.get('step')):  # a resumed run logs a step again: the later line wins, key by key
            numbers = {key: float(value) for key, value in row.items() if key != 'step' and _finite(value)}
            steps.setdefault(int(row['step']), {}).update(numbers)
        else:
            broken += 1
    if not steps:
        raise UserError(f'{path} has no logged step yet: wait for the first one, or leave this run out of the report')
    info = _run_json(os.path.join(folder, 'run.json'))
    phase = info.get('phase') or next((row['phase'] for row in rows if row.get('phase')), 'run')
    samples, lost = _json_lines(os.path.join(folder, 'samples.jsonl'))
    text = _text(os.path.join(folder, 'config.gin'))
    steps, broken = dict(sorted(steps.items())), broken + lost
    return Run(folder, label, info, steps, str(phase), samples, gin_values(text), text, broken)


def _not_a_run(folder):
    if not os.path.isdir(folder):
        return f"{folder} does not exist: give a run's folder (MODEL_DIR), one that holds {HOLDS}"
    inner = [name for name in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, name, 'metrics.jsonl'))]
    hint = f'; it contains runs, so name these: {", ".join(inner[:6])}' if inner else ''
    return f"{folder} is not a run's folder, since it has no metrics.jsonl (a run holds {HOLDS}){hint}"


def _json_lines(path):
    """Rows that are JSON objects and the number of lines that are not; half a line at the very end is not counted."""
    lines = _text(path).split('\n')
    rows, broken = [], 0
    for place, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif place < len(lines) - 1:
            broken += 1
    return rows, broken


def _run_json(path):
    text = _text(path)
    try:
        info = json.loads(text) if text.strip() else {}
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise UserError(f'{path} is not a JSON object: mend it, or delete it and the report does without')
    return info


def _text(path):
    if not os.path.isfile(path):
        return ''
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def _step(row):
    return int(row['step']) if _finite(row.get('step')) else 0


def _finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
