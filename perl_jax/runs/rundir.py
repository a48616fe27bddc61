"""MODEL_DIR: what a run leaves behind, and what lets the same command go on from where it was.

run.json        phase, tuning, base, vocabulary, sizes ..    metrics.jsonl   one object a logged step
config.gin      the operative configuration              samples.jsonl   one object a sampled answer
configs/N.gin   the same, of the start at step N
checkpoints/    see checkpoints.py                        events.*        the metrics for TensorBoard

It may lie in a bucket (gs://...). All processes of a job see the same folder; the first alone writes here.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.typing import ArrayLike

from perl_jax.errors import UserError
from perl_jax.parallel import memory

Logged = Mapping[str, ArrayLike]  # scalars by name
AVERAGE = 'the average of '  # how run.json says what a run is made of that `perl_jax average` made
KEPT = ('started', 'seconds', 'step_seconds', 'memory')  # of run.json, when a run goes on


class RunDir:
    """One run's folder, progress bar and clock. Metrics of a step are read while the next one already runs."""

    def __init__(
        self,
        model_dir: str,
        about: dict[str, Any],
        first: int,
        total: int,
        log_period: int,
        config: str,
        window: Sequence[dict[str, float]] = (),
    ) -> None:
        """Open the folder to log from step `first` on; what was logged beyond it (before a kill) is cut off.

        `about` becomes run.json; `config` is the text for config.gin; `window` is what `settle` gave at step `first`.
        Call `check` first: this one writes.
        """
        from clu import metric_writers
        from tqdm import tqdm

        self.folder, self.total, self.period = model_dir, total, log_period
        self.writes = jax.process_index() == 0
        before = read(model_dir) or {}
        self.about: dict[str, Any] = {'started': _now()} | {k: before[k] for k in KEPT if k in before} | about
        if self.writes:
            epath.Path(model_dir).mkdir(parents=True, exist_ok=True)
            for name in ('metrics.jsonl', 'samples.jsonl'):
                _cut(os.path.join(model_dir, name), first or -1)
            epath.Path(model_dir, 'configs').mkdir(exist_ok=True)
            for name in ('config.gin', f'configs/{first}.gin'):
                replace(os.path.join(model_dir, name), config)
            self.events = metric_writers.SummaryWriter(model_dir)
        self._save_about(finished=None)
        self.bar = tqdm(
            total=total, initial=first, desc=about['phase'], unit='step', dynamic_ncols=True, mininterval=0.5,
            disable=not self.writes,
        )  # fmt: skip
        self.phase, self.first = about['phase'], first
        self.pending: tuple[int, Logged, int, bool] | None = None
        self.window = list(window)  # the metrics of steps that are not written yet
        self.step_seconds: list[float] = []  # of each window
        self.programs, self.held = memory.programs(), 0
        self.examples = self.tokens = 0
        self.opened = self.clock = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """The steps still to do."""
        yield from range(self.first, self.total)

    def log(self, step: int, metrics: Logged, batch_size: int) -> None:
        """Take the metrics of training step `step` (1 is the first). `metrics['tokens']` counts its real tokens."""
        self._settle()
        self.pending = (step, metrics, batch_size, step % self.period == 0 or step == self.total)
        self.bar.update()

    def settle(self, flush: bool) -> list[dict[str, float]]:
        """Read what is pending; with `flush` write it out, as where a run evaluates. What is left is to be saved."""
        self._settle(force=flush)
        return self.window

    def evaluated(self, step: int, metrics: dict[str, float], samples: list[dict[str, Any]] | None = None) -> None:
        """Write evaluation metrics (their names get 'eval/') and sampled answers of a step."""
        if metrics:  # a run may have no evaluation data
            self._write_metrics(step, self.finite(step, {f'eval/{k}': v for k, v in metrics.items()}))
        self.bar.set_postfix({k: f'{v:.3g}' for k, v in metrics.items()}, refresh=False)
        self._append('samples.jsonl', [{'step': step, 'phase': self.phase} | row for row in samples or []])
        self.clock, self.examples, self.tokens = time.perf_counter(), 0, 0

    def finite(self, step: int, values: Logged) -> dict[str, float]:
        """The values as numbers; a UserError stops the run if one of them is none."""
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at step {step} of '{self.folder}': stopped, the checkpoint before it is kept; "
                    'lower the learning rate or look at that batch, then run the same command again'
                )
        return numbers

    def close(self, finished: bool) -> None:
        """Bring run.json up to date; a run that is not finished can go on later."""
        self.bar.close()
        if self.writes:
            self.events.close()
        if self.held:  # only now: a batch of another fill may have had a program of its own
            self.about['memory'] = memory.measure(self.programs, self.held)
        self._save_about(finished=_now() if finished else None)

    def _settle(self, force: bool = False) -> None:
        if self.pending is not None:
            step, metrics, batch_size, due = self.pending
            self.pending = None
            if step == self.first + 1:  # what the next step needs is held by now
                self.held = memory.held()
            values = self.finite(step, metrics)
            self.tokens += values.pop('tokens')
            self.examples += batch_size
            self.window.append(values)
            self.step = step
            force = force or due
        if force and self.window:
            means = {k: float(np.mean([w[k] for w in self.window])) for k in self.window[0]}
            seconds = time.perf_counter() - self.clock
            means |= {
                'throughput/examples_per_second': self.examples / seconds,
                'throughput/tokens_per_second': self.tokens / seconds,
            }
            self._write_metrics(self.step, means)
            self.step_seconds.append(seconds / len(self.window))
            if measured := self.step_seconds[1:]:  # the first waited for the compiler
                self.about['step_seconds'] = float(f'{np.median(measured):.4g}')
            self.window, self.examples, self.tokens, self.clock = [], 0, 0, time.perf_counter()

    def _write_metrics(self, step: int, values: dict[str, float]) -> None:
        self._append('metrics.jsonl', [{'step': step, 'phase': self.phase} | values])
        if self.writes:
            self.events.write_scalars(step, values)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.writes:
            with epath.Path(self.folder, name).open('a') as file:
                file.write(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))

    def _save_about(self, finished: str | None) -> None:
        seconds = self.about.get('seconds', 0) + (time.perf_counter() - self.opened if hasattr(self, 'opened') else 0)
        about = self.about | {'finished': finished, 'seconds': round(seconds, 1)}
        if self.writes:
            replace(os.path.join(self.folder, 'run.json'), json.dumps(about, indent=2) + '\n')


def imported(model_dir: str, about: dict[str, Any], source: str, config: str) -> None:
    """What a MODEL_DIR holds, beside checkpoints/, that no run has filled."""
    replace(os.path.join(model_dir, 'config.gin'), config)
    times = {'started': _now(), 'imported': source, 'finished': _now(), 'seconds': 0.0}
    replace(os.path.join(model_dir, 'run.json'), json.dumps(times | about, indent=2) + '\n')
    for name in ('metrics.jsonl', 'samples.jsonl'):
        replace(os.path.join(model_dir, name), '')


def is_imported(about: dict[str, Any]) -> bool:
    """Whether run.json is of `perl_jax import`, and not of a run, or of an average of some, with its configuration."""
    return not about.get('imported', AVERAGE).startswith(AVERAGE)


@contextlib.contextmanager
def whole(path: str) -> Iterator[str]:
    """A folder that is there whole or not at all."""
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(f"'{path}' is there already and not empty; name another folder")
    draft = f'{path.rstrip("/")}.tmp'
    shutil.rmtree(draft, ignore_errors=True)
    os.makedirs(draft)
    try:
        yield draft
        if os.path.isdir(path):
            os.rmdir(path)
        os.rename(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read(model_dir: str) -> dict[str, Any] | None:
    """run.json of a run's folder; None if there is none."""
    path = epath.Path(model_dir, 'run.json')
    if not path.exists():
        return None
    try:
        about = json.loads(path.read_text())
        if about['phase'] not in ('sft', 'reward', 'policy'):
            raise ValueError(f"its phase is '{about['phase']}'")
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"'{path}' is not what a run writes ({error}); name another folder") from error
    return about


def about(model_dir: str) -> dict[str, Any]:
    """run.json of a run's folder, which has to be one.

    Raises:
      UserError: there is none.
    """
    if (said := read(model_dir)) is None:
        raise UserError(f"'{model_dir}' has no run.json, so it is no MODEL_DIR of a run; name another folder")
    return said


@contextlib.contextmanager
def locked(model_dir: str) -> Iterator[None]:
    """While this holds, no other run of this machine writes there; the lock goes with the process, and is no file."""
    if jax.process_index() != 0 or '://' in model_dir:
        yield
        return
    os.makedirs(model_dir, exist_ok=True)
    folder = os.open(model_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(folder)
        raise UserError(
            f"MODEL_DIR '{model_dir}': another process is writing there; wait for it, or name another folder"
        ) from error
    except OSError:
        pass  # a network's file system may have no locks
    try:
        yield
    finally:
        os.close(folder)


def check(model_dir: str, about: dict[str, Any]) -> None:
    """Refuse a MODEL_DIR that another run, or the same one on another base, has written; nothing is written here."""
    before = read(model_dir)
    folder = epath.Path(model_dir, 'checkpoints')  # empty if a run was killed while it started
    if before is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"MODEL_DIR '{model_dir}' has checkpoints but no run.json; name another folder")
    for key in ('phase', 'tuning', 'base', 'trainable_parameters'):
        if before is not None and _same(before.get(key)) != _same(about[key]):
            raise UserError(
                f"MODEL_DIR '{model_dir}' is a run with another {key} ({_short(before.get(key))}, "
                f'now {_short(about[key])}); name another folder, or delete it to start over'
            )


def _same(value: Any) -> Any:
    """What has to be the same: of a base its fingerprint, wherever it lies by now."""
    return value['fingerprint'] if isinstance(value, dict) else value


def _short(value: Any) -> str:
    return value['path'] + ' ' + value['fingerprint'] if isinstance(value, dict) else str(value)


def _cut(path: str, step: int) -> None:
    """Keep the whole lines up to `step`: an unbroken run would have written just these."""
    if not epath.Path(path).exists():
        return
    whole = epath.Path(path).read_text().split('\n')[:-1]  # a line that a killed process broke off has no end
    kept, odd = [], 0
    for line in whole:
        try:
            kept += [line + '\n'] if json.loads(line)['step'] <= step else []
        except (ValueError, TypeError, KeyError):
            odd += 1  # as a machine that lost its power leaves them
    if odd:
        logging.getLogger('perl_jax').warning(f'{path}: {odd} lines are no log of a step; dropped')
    replace(path, ''.join(kept))


def replace(path: str, text: str) -> None:
    """All or nothing: a killed process leaves the old file."""
    draft = epath.Path(path + '.tmp')
    draft.write_text(text)
    draft.replace(path)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
