"""MODEL_DIR: the output of a run, and what the same command needs to resume it.

run.json        phase, tuning, base, vocabulary, sizes ..    metrics.jsonl   one object a logged step
config.gin      the operative configuration              samples.jsonl   one object a sampled answer
configs/N.gin   the same, of the start at step N
checkpoints/    see checkpoints.py                        events.*        the metrics for TensorBoard

It may be in a bucket (gs://...). All processes of a job see the same folder; only the first one writes here.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from jax.typing import ArrayLike

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.parallel import memory
from perl_jax.runs import logs, progress
from perl_jax.settings import NonNegative, Size

Logged = Mapping[str, ArrayLike]  # scalars by name
AVERAGE = 'the average of '  # how `imported` in run.json begins for a result of `perl_jax average`
CARRIED_OVER = ('started', 'seconds', 'step_seconds', 'memory')  # fields of run.json that a resumed run keeps
_Seconds = NonNegative | None
_Size = Size | None
_FIELDS: dict[str, Any] = {  # of run.json, as far as they are read again
    'phase': Literal['sft', 'reward', 'policy'], 'tuning': str | None,
    'vocabulary': str | None, 'vocabulary_fingerprint': str | None, 'imported': str | None, 'started': str | None,
    'seconds': _Seconds, 'step_seconds': _Seconds, 'memory': Mapping[str, float | None] | None,
    'trainable_parameters': _Size, 'base_parameters': _Size, 'devices': str | None, 'rewards': Sequence[str] | None,
    'data_fingerprint': str | None,
}  # fmt: skip


class RunDir:
    """One run's folder, progress bar and clock. Metrics of a step are fetched while the next one runs."""

    def __init__(
        self,
        model_dir: str,
        about: dict[str, Any],
        *,
        first: int,
        total: int,
        log_period: int,
        config: str,
        window: Sequence[dict[str, float]] = (),
    ) -> None:
        """Open the folder to log from step `first` on; entries of later steps (before a kill) are removed.

        Call `check` first: this one writes.

        Args:
          model_dir: the folder.
          about: the contents of run.json.
          first: the number of steps that are done.
          total: the number of steps of the run.
          log_period: steps between entries of metrics.jsonl.
          config: the text of config.gin.
          window: what `settle` returned at step `first`.
        """
        from clu import metric_writers

        self.folder, self.total, self.period = model_dir, total, log_period
        self.is_writer = jax.process_index() == 0
        old_info = read(model_dir) or {}
        self.about: dict[str, Any] = (
            {'started': _timestamp()} | {k: old_info[k] for k in CARRIED_OVER if k in old_info} | about
        )
        if self.is_writer:
            epath.Path(model_dir).mkdir(parents=True, exist_ok=True)
            for name in ('metrics.jsonl', 'samples.jsonl'):
                logs.truncate(os.path.join(model_dir, name), first or -1)
            logs.truncate_events(model_dir, first or -1)
            epath.Path(model_dir, 'configs').mkdir(exist_ok=True)
            for name in ('config.gin', f'configs/{first}.gin'):
                logs.replace(os.path.join(model_dir, name), config)
            self.events = metric_writers.SummaryWriter(model_dir)
        self._save_about(finished=None)
        self.bar = progress.Bar(about['phase'], first=first, total=total, is_shown=self.is_writer)
        self.phase, self.first = about['phase'], first
        self.pending: tuple[int, Logged, int, bool] | None = None
        self.window = list(window)  # metrics that are not written yet
        self.step_seconds: list[float] = []  # of each window
        self.programs, self.live_bytes = memory.programs(), 0
        self.examples = self.tokens = 0
        self.open_time = self.window_start = time.perf_counter()

    def steps(self) -> Iterator[int]:
        """Yields the remaining steps."""
        yield from range(self.first, self.total)

    def log(self, step: int, metrics: Logged, batch_size: int) -> None:
        """Record the metrics of a training step. They are fetched from the device at the next step's, to not wait.

        Args:
          step: completed steps, from 1.
          metrics: scalars by name; 'tokens' is the number of real tokens.
          batch_size: examples of the step.
        """
        self._settle()
        self.pending = (step, metrics, batch_size, step % self.period == 0 or step == self.total)
        if step == self.first + 1:  # compiling took longer than fetching will
            self._settle()
        self.bar.advance()

    def settle(self, flush: bool) -> list[dict[str, float]]:
        """Fetch pending metrics, and with `flush` write them, as before an evaluation.

        Returns:
          The metrics that are not written yet, which a checkpoint has to save.
        """
        self._settle(force=flush)
        return list(self.window)

    def evaluated(self, step: int, metrics: dict[str, float], samples: list[dict[str, Any]] | None = None) -> None:
        """Write the metrics and the sampled answers of an evaluation.

        Args:
          step: completed steps.
          metrics: by name, before which 'eval/' is put.
          samples: rows of samples.jsonl.

        Raises:
          UserError: a metric is not finite.
        """
        if metrics:  # empty without evaluation data
            self._write_metrics(step, self.finite(step, {f'eval/{k}': v for k, v in metrics.items()}))
        self.bar.show_evaluation(metrics)
        self._append('samples.jsonl', [{'step': step, 'phase': self.phase} | row for row in samples or []])
        self.window_start, self.examples, self.tokens = time.perf_counter(), 0, 0

    def finite(self, step: int, values: Logged) -> dict[str, float]:
        """Returns the values as floats.

        Args:
          step: completed steps, for the message.
          values: scalars by name.

        Raises:
          UserError: one of them is not finite, which stops the run.
        """
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at step {step} of '{self.folder}': stopped, the checkpoint before it is kept; "
                    'lower the learning rate or look at that batch, then run the same command again'
                )
        return numbers

    def close(self, finished: bool) -> None:
        """Write the final run.json; a run that is not finished can be resumed."""
        self.bar.close()
        if self.is_writer:
            self.events.close()
        if self.live_bytes:  # at the end, since batches of other shapes compile programs later
            self.about['memory'] = memory.measure(self.programs, self.live_bytes)
        self._save_about(finished=_timestamp() if finished else None)

    def _settle(self, force: bool = False) -> None:
        if self.pending is not None:
            step, metrics, batch_size, is_due = self.pending
            self.pending = None
            if step == self.first + 1:  # all that steps keep is allocated by now
                self.live_bytes = memory.live_bytes()
            values = self.finite(step, metrics)
            self.tokens += values.pop('tokens')
            self.examples += batch_size
            self.window.append(values)
            self.bar.show_step(values)
            self.step = step
            force = force or is_due
        if force and self.window:
            means = {k: float(np.mean([w[k] for w in self.window])) for k in self.window[0]}
            seconds = time.perf_counter() - self.window_start
            means |= {
                'throughput/examples_per_second': self.examples / seconds,
                'throughput/tokens_per_second': self.tokens / seconds,
            }
            self._write_metrics(self.step, means)
            self.step_seconds.append(seconds / len(self.window))
            if measured := self.step_seconds[1:]:  # the first includes compilation
                self.about['step_seconds'] = float(f'{np.median(measured):.4g}')
            self.window, self.examples, self.tokens, self.window_start = [], 0, 0, time.perf_counter()

    def _write_metrics(self, step: int, values: dict[str, float]) -> None:
        self._append('metrics.jsonl', [{'step': step, 'phase': self.phase} | values])
        if self.is_writer:
            self.events.write_scalars(step, values)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self.is_writer:
            with epath.Path(self.folder, name).open('a') as file:
                file.write(''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows))

    def _save_about(self, finished: str | None) -> None:
        seconds = self.about.get('seconds', 0) + (
            time.perf_counter() - self.open_time if hasattr(self, 'open_time') else 0
        )
        about = self.about | {'finished': finished, 'seconds': round(seconds, 1)}
        if self.is_writer:
            logs.replace(os.path.join(self.folder, 'run.json'), json.dumps(about, indent=2) + '\n')


def write_imported(model_dir: str, about: dict[str, Any], source: str, config: str) -> None:
    """Write the files of a MODEL_DIR, apart from checkpoints/, for an adapter that comes from `source`."""
    logs.replace(os.path.join(model_dir, 'config.gin'), config)
    times = {'started': _timestamp(), 'imported': source, 'finished': _timestamp(), 'seconds': 0.0}
    logs.replace(os.path.join(model_dir, 'run.json'), json.dumps(times | about, indent=2) + '\n')
    for name in ('metrics.jsonl', 'samples.jsonl'):
        logs.replace(os.path.join(model_dir, name), '')


def is_imported(about: dict[str, Any]) -> bool:
    """Returns whether run.json is of `perl_jax import`; a run, or an average of runs, has a configuration."""
    return not about.get('imported', AVERAGE).startswith(AVERAGE)


@contextlib.contextmanager
def complete_folder(path: str) -> Iterator[str]:
    """Yields a draft folder that becomes `path` when it is complete, so that partial output is never seen.

    The draft has the name of its process, so that it is nobody else's folder; those of killed processes are removed.
    """
    if os.path.isdir(path) and os.listdir(path):
        raise UserError(f"'{path}' is there already and not empty; name another folder")
    path = os.path.abspath(path)
    draft_folder = f'{path}.{socket.gethostname()}.{os.getpid()}.draft'
    for name in os.listdir(os.path.dirname(path)) if os.path.isdir(os.path.dirname(path)) else []:
        pattern = rf'{re.escape(os.path.basename(path))}\.{re.escape(socket.gethostname())}\.(\d+)\.draft'
        if (match := re.fullmatch(pattern, name)) and not _is_alive(int(match[1])):
            shutil.rmtree(os.path.join(os.path.dirname(path), name), ignore_errors=True)
    os.makedirs(draft_folder)
    try:
        yield draft_folder
        if os.path.isdir(path):
            os.rmdir(path)
        os.rename(draft_folder, path)
    finally:
        shutil.rmtree(draft_folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def configs(model_dir: str) -> list[str]:
    """The configuration of every start of a run, as paths; runs of older versions have that of the last alone."""
    starts = sorted(epath.Path(model_dir, 'configs').glob('*.gin')) if '://' not in model_dir else []
    return [os.fspath(path) for path in starts] or [os.path.join(model_dir, 'config.gin')]


def read(model_dir: str) -> dict[str, Any] | None:
    """Returns run.json of a MODEL_DIR; None without one."""
    path = epath.Path(model_dir, 'run.json')
    if not path.exists():
        return None
    run_info = json_files.read(path, _FIELDS, 'name another folder')
    if 'base' in run_info:
        json_files.check(run_info, str(path), {'base.path': str, 'base.fingerprint': str | None})
    return run_info


def require(model_dir: str) -> dict[str, Any]:
    """Returns run.json of a MODEL_DIR.

    Raises:
      UserError: there is none.
    """
    if (run_info := read(model_dir)) is None:
        raise UserError(f"'{model_dir}' has no run.json, so it is no MODEL_DIR of a run; name another folder")
    return run_info


@contextlib.contextmanager
def locked(model_dir: str) -> Iterator[None]:
    """Hold a lock on the folder against other runs on this machine; it ends with the process and leaves no file."""
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
        pass  # network file systems may have no locks
    try:
        yield
    finally:
        os.close(folder)


def check(model_dir: str, about: dict[str, Any]) -> None:
    """Refuse a MODEL_DIR that another run, or the same one on another base, has written; writes nothing.

    Raises:
      UserError: the folder belongs to another run, or has checkpoints without a run.json.
    """
    old_info = read(model_dir)
    folder = epath.Path(model_dir, 'checkpoints')  # empty if a run was killed at its start
    if old_info is None and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"MODEL_DIR '{model_dir}' has checkpoints but no run.json; name another folder")
    for key in ('phase', 'tuning', 'base', 'trainable_parameters'):
        if old_info is not None and _identity(old_info.get(key)) != _identity(about[key]):
            raise UserError(
                f"MODEL_DIR '{model_dir}' is a run with another {key} ({_short(old_info.get(key))}, "
                f'now {_short(about[key])}); name another folder, or delete it to start over'
            )


def _identity(value: Any) -> Any:
    """Returns what has to stay the same: of a base its fingerprint, not its path."""
    return value['fingerprint'] if isinstance(value, dict) else value


def _short(value: Any) -> str:
    return value['path'] + ' ' + value['fingerprint'] if isinstance(value, dict) else str(value)


def _timestamp() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat()  # microseconds too, since lineage.py tells runs by it
