"""What the three loops share: starting or resuming a run, its log, its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from perl_jax import settings
from perl_jax.data.batches.streams import Stream, fingerprint
from perl_jax.data.vocabulary import RunVocabulary
from perl_jax.errors import Preempted, UserError
from perl_jax.models import lora
from perl_jax.parallel.distributed import preemption
from perl_jax.runs import base as bases
from perl_jax.runs import lineage, progress, resume, rundir
from perl_jax.runs.base import Base
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Folder, length and seed of a run.

    Attributes:
      model_dir: the run's folder (runs/rundir.py).
      total_steps: the number of steps in all, those before a restart included.
      eval_period: steps between evaluations with a checkpoint; the last step has one too.
      log_period: steps between lines of metrics.
      random_seed: seed of adapters, data order and sampling.
      config_text: VOCABULARY, or None for the task's own -> the text of config.gin.
      check_resume: (config.gin of the last start, of this one) -> {name: line} of the settings that changed and are
        taken; raises UserError for one that may not change (runs/resume.py).
      provenance: () -> fields of run.json about where the run came from (runs/provenance.py).
      accept_other_data: resume although settings of the data have changed, so that later batches differ.
    """

    model_dir: str
    total_steps: settings.Count
    eval_period: settings.Count = 1000
    log_period: settings.Count = 10
    random_seed: settings.Natural = 0
    config_text: Callable[[str | None], str] = lambda vocabulary: ''
    check_resume: Callable[[str, str], Mapping[str, str]] = lambda before, after: {}
    provenance: Callable[[], Mapping[str, str]] = dict
    accept_other_data: bool = False

    def __post_init__(self) -> None:
        settings.check(self)
        if not self.model_dir or self.model_dir.startswith('~'):
            raise UserError(f'MODEL_DIR = {self.model_dir!r}: give the path of a folder, without ~')


class Session:
    """A run in progress.

    Attributes:
      states: the restored states, or those given to `start`, by name.
      changes: the settings changed since the last start, {name: line}.
      steps: yields the steps that are left.
      log: (step, metrics, examples): records the metrics of a step.
      evaluated: (step, metrics, samples): records an evaluation.
    """

    def __init__(
        self,
        config: RunConfig,
        folder: rundir.RunDir | None,
        checkpoints: Checkpoints,
        *,
        states: dict[str, Any],
        name: dict,
        stop_signal: Callable[[int], int],
        changes: Mapping[str, str],
    ) -> None:
        self.states, self.changes = states, changes
        self._config, self._folder, self._checkpoints, self._name = config, folder, checkpoints, name
        self._stop_signal = stop_signal
        if folder is None:  # a finished run: no steps, nothing to write
            self.steps = lambda: iter(())
        else:
            self.log, self.steps, self.evaluated = folder.log, folder.steps, folder.evaluated

    def report(self, line: str) -> None:
        """Log a setting that has changed since the last start."""
        if self._folder is not None:
            _report(self._name['phase'], self._folder.first, line)

    def checkpoint(
        self,
        step: int,
        states: dict[str, Any],
        measure: Callable[[], tuple[dict[str, float], list[dict[str, Any]]]],
    ) -> None:
        """Evaluate and save if `step` is due; save and stop if the job is being preempted.

        Args:
          step: completed steps.
          states: the states to save, by name.
          measure: evaluates: () -> metrics, samples. It runs only if an evaluation is due.

        Raises:
          Preempted: after SIGTERM, when the state is saved.
          KeyboardInterrupt: after Ctrl-C, when the state is saved.
          UserError: metrics or adapters are not finite; nothing is saved then.
        """
        assert self._folder is not None  # a finished run has no step
        stop_signal = self._stop_signal(step)
        due = step % self._config.eval_period == 0 or step == self._config.total_steps
        if not (due or stop_signal):
            return
        metrics, window, learned = None, self._folder.settle(flush=due), _learned(states)
        self._folder.finite(step, {f'norm/{role}': optax.global_norm(adapter) for role, adapter in learned.items()})
        if due:
            metrics, samples = measure()
            self._folder.evaluated(step, metrics, samples)
        adapters = {role: {'scale': x.scale, 'dropout': x.dropout} for role, x in learned.items()}
        self._checkpoints.save(step, states, self._name | {'adapters': adapters, 'window': window}, metrics)
        if stop_signal and step < self._config.total_steps:
            stop = KeyboardInterrupt if stop_signal == signal.SIGINT else Preempted
            raise stop(f'saved at step {step} of {self._config.total_steps}')


@contextlib.contextmanager
def start(
    phase: str,
    config: RunConfig,
    tuning: str,
    base: Base,
    states: dict[str, Any],
    *,
    vocabulary: RunVocabulary | None = None,
    best: str | None = None,
    learns_from: Sequence[str] = (),
    streams: Sequence[Stream] = (),
) -> Iterator[Session]:
    """Open MODEL_DIR to start a run, or to resume one.

    Args:
      phase: 'sft', 'reward' or 'policy'.
      config: of the run.
      tuning: 'lora' or 'full', or both for an ensemble of both.
      base: the frozen base, named in run.json and in checkpoints.
      states: the TrainState of each role at step 0, and other values to save; a checkpoint in MODEL_DIR replaces them.
      vocabulary: of the data sets.
      best: the evaluation metric whose best checkpoint is kept beside the latest.
      streams: the training batches; their rows have to be those that a resumed run began with.
      learns_from: the MODEL_DIRs of a policy's rewards and of its base; run.json records which rewards these are.

    Yields:
      The Session.

    Raises:
      UserError: MODEL_DIR belongs to another run, another base or another process.
    """
    about = {
        'phase': phase,
        'tuning': tuning,
        'trainable_parameters': lora.count(_learned(states)),
        'base_parameters': lora.count(base.params),
        'base': base.name,
        **(vocabulary.run_fields if vocabulary else {}),
        'devices': bases.describe_devices(),
        **({'rewards': lineage.rewards([config.model_dir, *learns_from])} if learns_from else {}),
        **config.provenance(),
        **({'data_fingerprint': rows} if (rows := fingerprint(streams)) else {}),
    }
    text = config.config_text(vocabulary and vocabulary.setting)
    changes = _changes(config, text)
    rundir.check(config.model_dir, about)
    with rundir.locked(config.model_dir):
        checkpoints = Checkpoints(config.model_dir, best)
        first = checkpoints.latest() or 0
        if first:
            _check_rows(config, about)
            _check_scale(config.model_dir, checkpoints.about(first)['adapters'], states)
            suspects = [_with_name(*change) for change in changes.items() if resume.may_change_state(change[0])]
            states = checkpoints.restore(first, states, suspects)
        name = {'phase': phase, 'base': base.name}
        if first >= config.total_steps:
            checkpoints.close()
            logging.getLogger('perl_jax').warning(
                f"{phase}: '{config.model_dir}' is finished ({first} of {config.total_steps} steps); "
                'for more raise TRAIN_STEPS'
            )
            yield Session(
                config, None, checkpoints, states=states, name=name, stop_signal=lambda step: 0, changes={}
            )
            return
        window = checkpoints.about(first).get('window', []) if first else []
        if jax.process_index() == 0:
            logging.getLogger('perl_jax').info(
                f'{phase}: base {base.path}, vocabulary {vocabulary}, steps {first} to {config.total_steps}'
            )
        for line in sorted(set(changes.values())):
            _report(phase, first, line)
        folder = rundir.RunDir(
            config.model_dir, about, first=first, total=config.total_steps, log_period=config.log_period, config=text,
            window=window,
        )  # fmt: skip
        finished = False
        with preemption() as stop_signal:  # around the end, too, where checkpoints are still being written
            try:
                try:
                    yield Session(
                        config, folder, checkpoints, states=states, name=name, stop_signal=stop_signal, changes=changes
                    )
                finally:
                    checkpoints.close()  # waits for what is being saved, which may fail
                finished = True
            finally:
                folder.close(finished)
        if jax.process_index() == 0:
            line = progress.closing_line(phase, config.model_dir, folder.bar.evaluation)
            logging.getLogger('perl_jax').info(line)


def _check_rows(config: RunConfig, about: Mapping[str, Any]) -> None:
    """Refuse rows that are not those of the earlier steps; older versions recorded none."""
    key = 'data_fingerprint'
    old, new = (rundir.read(config.model_dir) or {}).get(key), about.get(key)
    if old and new and old != new and not config.accept_other_data:
        raise UserError(
            f"the training rows are not those that '{config.model_dir}' began with: a file has changed, or a task, or "
            'what prepares its rows; put them back, name another MODEL_DIR, or take them on purpose with '
            '--gin.ACCEPT_OTHER_DATA=True'
        )


def _report(phase: str, first: int, line: str) -> None:
    if jax.process_index() == 0:
        logging.getLogger('perl_jax').warning(f'{phase}: from step {first} on {line}')


def _changes(config: RunConfig, text: str) -> Mapping[str, str]:
    """The settings changed since the last start, {name: line}; raises UserError for one that may not change."""
    last_config = epath.Path(config.model_dir, 'config.gin')
    if not last_config.exists() or not epath.Path(config.model_dir, 'checkpoints').is_dir():
        return {}
    with contextlib.closing(Checkpoints(config.model_dir, read_only=True)) as checkpoints:
        first = checkpoints.latest() or 0
    return config.check_resume(last_config.read_text(), text) if 0 < first < config.total_steps else {}


def _with_name(name: str, line: str) -> str:
    """The line about a change with the setting's own name, where it names a macro."""
    return line if line.startswith(name) else f'{line} ({name})'


def write_finished_run(
    folder: str,
    phase: str,
    role: str,
    adapter: lora.Adapter,
    *,
    base: dict[str, Any],
    base_parameters: int,
    vocabulary: Mapping[str, str | None],
    source: str,
    config_text: str,
    members: Sequence[str] = (),
) -> None:
    """Write a MODEL_DIR for an imported or averaged adapter, as a finished run of one role would leave it.

    Args:
      folder: the MODEL_DIR.
      phase: 'reward' or 'policy'.
      role: the adapter's name in the checkpoint.
      adapter: what to save.
      base: `Base.name`.
      base_parameters: how many parameters the base has.
      vocabulary: `RunVocabulary.run_fields`.
      source: where the adapter comes from, for run.json.
      config_text: of config.gin.
      members: the MODEL_DIRs that were averaged; run.json records which rewards they are, or learned from.
    """
    state = TrainState(step=jnp.int32(0), adapter=jax.tree.map(jnp.asarray, adapter), opt_state=())
    adapters = {role: {'scale': adapter.scale, 'dropout': adapter.dropout}}
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, {role: state}, {'phase': phase, 'base': base, 'adapters': adapters})
    checkpoints.close()
    about = {
        'phase': phase,
        'tuning': 'full' if adapter.lora is None else 'lora',
        'trainable_parameters': lora.count(adapter),
        'base_parameters': base_parameters,
        'base': base,
        'vocabulary': None,
        **vocabulary,
        'devices': bases.describe_devices(),
        **({'rewards': lineage.rewards(members)} if members else {}),
    }
    rundir.write_imported(folder, about, source, config_text)


def _check_scale(model_dir: str, adapters: dict[str, dict[str, Any]], states: dict[str, Any]) -> None:
    for role, adapter in _learned(states).items():
        if (saved := lora.as_scale(adapters[role]['scale'])) != adapter.scale:
            old, new = (f'{x:g}' if isinstance(x, float | int) else 'of each layer' for x in (saved, adapter.scale))
            raise UserError(
                f"MODEL_DIR '{model_dir}' is a run with LoRA's alpha / rank = {old}, now {new}; "
                'set LoraSpec.alpha as it was, or name another folder'
            )


def _learned(states: dict[str, Any]) -> dict[str, lora.Adapter]:
    """The adapter of each role."""
    return {role: state.adapter for role, state in states.items() if isinstance(state, TrainState)}
