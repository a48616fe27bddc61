"""Reads the folders of finished and unfinished runs for the report.

A run's folder holds metrics.jsonl (required) and run.json, config.gin and samples.jsonl (optional). The logs of a run
in progress may end with an incomplete line; those of a run that was killed and resumed may contain one, and repeated
steps.
"""

import dataclasses
import json
import os
import re
import sys

import numpy as np

from perl_jax import json_files
from perl_jax.errors import UserError

PHASES = ('sft', 'reward', 'policy')
_INFO = {'phase': str | None, 'base.path': str | None, 'base.fingerprint': str | None}  # of run.json
RUN_FILES = 'metrics.jsonl, run.json, config.gin, samples.jsonl'


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of one run's folder.

    Attributes:
      folder: its absolute path.
      label: its path relative to the common parent of all runs.
      info: run.json, {} if missing.
      steps: {step: {key: finite float}}, ascending.
      phase: 'sft', 'reward', 'policy', or another value in run.json.
      samples: rows of samples.jsonl.
      config: {gin key: value text}.
      config_text: config.gin, '' if missing.
      broken: the number of unreadable lines, without an incomplete last line.
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
        """Return 'lora', 'full', or '' if run.json lacks it."""
        return str(self.info.get('tuning') or '')

    @property
    def running(self) -> bool:
        """Tell whether run.json has no finish time."""
        return bool(self.info) and not self.info.get('finished')

    @property
    def keys(self) -> list[str]:
        """Return the metric names in the order of their first occurrence."""
        return list(dict.fromkeys(key for row in self.steps.values() for key in row))

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps that logged `key` and its values: two float64 arrays of one length, possibly empty."""
        points = [(step, row[key]) for step, row in self.steps.items() if key in row]
        steps, values = zip(*points) if points else ((), ())
        return np.asarray(steps, float), np.asarray(values, float)

    def last_samples(self) -> tuple[int, list[dict]]:
        """Return the last sampled step and its rows, in the file's order."""
        last = max((_step(row) for row in self.samples), default=0)
        return last, [row for row in self.samples if _step(row) == last]


def read(folders: list[str]) -> list[Run]:
    """Read every distinct folder; runs are ordered by phase (SFT, reward, policy), then as in `folders`.

    Raises:
      UserError: there is no folder, one is not a run's, or its metrics are empty.
    """
    folders = list(dict.fromkeys(os.path.abspath(folder) for folder in folders))
    if not folders:
        raise UserError(f"report needs at least one run's folder, one that holds {RUN_FILES}")
    parent = common_parent(folders)
    runs = [_read_run(folder, _label(folder, parent)) for folder in folders]
    phase_order = {phase: index for index, phase in enumerate(PHASES)}
    return sorted(runs, key=lambda run: phase_order.get(run.phase, len(PHASES)))


def common_parent(folders: list[str]) -> str:
    """Return the deepest common parent of the folders; never one of the folders themselves."""
    parent = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    is_one_of_them = parent in [os.path.abspath(folder) for folder in folders]
    return os.path.dirname(parent) if is_one_of_them else parent


def gin_values(text: str) -> dict[str, str]:
    """Parse the assignments of a gin file: {key: value text in one line}, without comments, imports and includes."""
    values, key = {}, None
    for line in text.splitlines():
        start = re.match(r'([\w./-]+)\s*=\s*(.*)', line)
        if start:
            key, line = start.groups()
            values[key] = ''
        elif not re.match(r'[\s\])}]', line):  # indented lines and closing brackets continue a value
            key = None
        if key:
            values[key] += ' ' + line.strip().removesuffix('\\')
    return {key: re.sub(r'\s+', ' ', value).strip() for key, value in values.items()}


def _label(folder, parent):
    return os.path.relpath(folder, parent).replace(os.sep, '/')


def _read_run(folder, label):
    path = os.path.join(folder, 'metrics.jsonl')
    if not os.path.isfile(path):
        raise UserError(_not_a_run_message(folder))
    rows, broken = _json_lines(path)
    steps = {}
    for row in rows:
        if is_finite(row.get('step')):  # a resumed run logs a step again: the later line wins, key by key
            values = {key: float(value) for key, value in row.items() if key != 'step' and is_finite(value)}
            steps.setdefault(int(row['step']), {}).update(values)
        else:
            broken += 1
    if not steps:
        raise UserError(f'{path} has no logged step yet: wait for the first one, or leave this run out of the report')
    info = _run_json(os.path.join(folder, 'run.json'))
    phase = info.get('phase') or next((row['phase'] for row in rows if row.get('phase')), 'run')
    samples, broken_samples = _json_lines(os.path.join(folder, 'samples.jsonl'))
    text = _text(os.path.join(folder, 'config.gin'))
    steps, broken = dict(sorted(steps.items())), broken + broken_samples
    return Run(folder, label, info, steps, str(phase), samples, gin_values(text), text, broken)


def _not_a_run_message(folder):
    if not os.path.isdir(folder):
        return f"{folder} does not exist: give a run's folder (MODEL_DIR), one that holds {RUN_FILES}"
    run_names = [
        name for name in sorted(os.listdir(folder)) if os.path.isfile(os.path.join(folder, name, 'metrics.jsonl'))
    ]
    hint = f'; it contains runs, give their folders: {", ".join(run_names[:6])}' if run_names else ''
    return f"{folder} is not a run's folder, since it has no metrics.jsonl (a run holds {RUN_FILES}){hint}"


def _json_lines(path):
    """Return the lines that are JSON objects, and the number of others except an incomplete last line."""
    lines = _text(path).split('\n')
    rows, broken = [], 0
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif index < len(lines) - 1:
            broken += 1
    return rows, broken


def _run_json(path):
    text = _text(path)
    try:
        info = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        raise UserError(f'{path} is not a JSON object: repair or delete it; the report does not require it')
    json_files.check(info, path, _INFO)
    return info


def _text(path):
    if not os.path.isfile(path):
        return ''
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def _step(row):
    return int(row['step']) if is_finite(row.get('step')) else 0


def is_finite(value):
    """Return whether a value is a number that float64 holds."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -sys.float_info.max <= value <= sys.float_info.max
