"""What the three loops share: starting a run or going on with it, its log, its checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from perl_jax.data.vocabulary import RunVocabulary
from perl_jax.errors import Preempted, UserError, check_count
from perl_jax.models import lora
from perl_jax.parallel.distributed import preemption
from perl_jax.runs import base as bases
from perl_jax.runs import rundir
from perl_jax.runs.base import Base
from perl_jax.runs.checkpoints import Checkpoints
from perl_jax.types import TrainState


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run goes and how long.

    model_dir: its folder (rundir.py).   total_steps: in all, those before a restart included.
    eval_period: evaluate and save a checkpoint every so many steps, and at the last.   log_period: log every so many.
    random_seed: of the adapters, the data's order and the sampler.   config_text: gives the text of config.gin,
      told what VOCABULARY is in it, or None for the task's own.   check_resume: (text of the last start, of this one)
      -> a line for each setting that is another one now and is taken; raises where it may not be (resume.py).
    accept_other_data: go on with a run though its batches become other ones.
    """

    model_dir: str
    total_steps: int
    eval_period: int = 1000
    log_period: int = 10
    random_seed: int = 0
    config_text: Callable[[str | None], str] = lambda vocabulary: ''
    check_resume: Callable[[str, str], Sequence[str]] = lambda before, after: ()
    accept_other_data: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model_dir, str) or not self.model_dir or self.model_dir.startswith('~'):
            raise UserError(f'MODEL_DIR = {self.model_dir!r}: give the path of a folder, without ~')
        check_count('TRAIN_STEPS', self.total_steps)
        check_count('EVAL_PERIOD', self.eval_period)
        check_count('RunConfig.log_period', self.log_period)
        check_count('RANDOM_SEED', self.random_seed, 0)


class Run:
    """A run under way. `states` is as it was last saved, or as it was handed to `start`."""

    def __init__(
        self,
        config: RunConfig,
        folder: rundir.RunDir | None,
        checkpoints: Checkpoints,
        states: dict[str, Any],
        name: dict,
        preempted: Callable[[int], bool],
    ) -> None:
        self.states = states
        self._config, self._folder, self._checkpoints, self._name = config, folder, checkpoints, name
        self._preempted = preempted
        if folder is None:  # a finished run: nothing to do, nothing to write
            self.steps = lambda: iter(())
        else:
            self.log, self.steps, self.evaluated = folder.log, folder.steps, folder.evaluated

    def checkpoint(
        self,
        step: int,
        states: dict[str, Any],
        measure: Callable[[], tuple[dict[str, float], list[dict[str, Any]]]],
    ) -> None:
        """After `step` steps: where it is due, evaluate and save; where the job is being preempted, save and stop.

        Nothing is saved of a step whose metrics or adapters are not finite.

        Raises:
          Preempted: the state is saved.
        """
        assert self._folder is not None  # a finished run has no step
        leave = self._preempted(step)
        due = step % self._config.eval_period == 0 or step == self._config.total_steps
        if not (due or leave):
            return
        metrics, window, learned = None, self._folder.settle(flush=due), _learned(states)
        self._folder.finite(step, {f'norm/{role}': optax.global_norm(adapter) for role, adapter in learned.items()})
        if due:
            metrics, samples = measure()
            self._folder.evaluated(step, metrics, samples)
        adapters = {role: {'scale': x.scale, 'dropout': x.dropout} for role, x in learned.items()}
        self._checkpoints.save(step, states, self._name | {'adapters': adapters, 'window': window}, metrics)
        if leave and step < self._config.total_steps:
            raise Preempted(f'saved at step {step} of {self._config.total_steps}')


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
) -> Iterator[Run]:
    """Open MODEL_DIR for a run, or to go on with one.

    Args:
      tuning: 'lora' or 'full', or both where an ensemble has both.
      states: each role's TrainState at step 0, and what else is to be saved; a checkpoint in MODEL_DIR takes its place.
      vocabulary: what its data sets are read with.
      best: the metric of the evaluation whose best checkpoint is kept beside the latest.

    Raises:
      UserError: MODEL_DIR belongs to another run, another base or another process.
    """
    about = {
        'phase': phase,
        'tuning': tuning,
        'trainable_parameters': lora.count(_learned(states)),
        'base_parameters': lora.count(base.params),
        'base': base.name,
        **(vocabulary.about if vocabulary else {}),
        'devices': bases.describe_devices(),
    }
    text = config.config_text(vocabulary and vocabulary.setting)
    changed = _changed(config, text)
    rundir.check(config.model_dir, about)
    with rundir.locked(config.model_dir):
        checkpoints = Checkpoints(config.model_dir, best)
        first = checkpoints.latest() or 0
        if first:
            _check_scale(config.model_dir, checkpoints.about(first)['adapters'], states)
            states = checkpoints.restore(first, states)
        name = {'phase': phase, 'base': base.name}
        if first >= config.total_steps:
            checkpoints.close()
            logging.getLogger('perl_jax').warning(
                f"{phase}: '{config.model_dir}' is finished ({first} of {config.total_steps} steps); "
                'for more raise TRAIN_STEPS'
            )
            yield Run(config, None, checkpoints, states, name, lambda step: False)
            return
        window = checkpoints.about(first).get('window', []) if first else []
        if jax.process_index() == 0:
            logging.getLogger('perl_jax').info(
                f'{phase}: base {base.path}, vocabulary {vocabulary}, steps {first} to {config.total_steps}'
            )
            for line in changed:
                logging.getLogger('perl_jax').warning(f'{phase}: from step {first} on {line}')
        folder = rundir.RunDir(config.model_dir, about, first, config.total_steps, config.log_period, text, window)
        finished = False
        try:
            with preemption() as preempted:
                yield Run(config, folder, checkpoints, states, name, preempted)
            finished = True
        finally:
            checkpoints.close()
            folder.close(finished)


def _changed(config: RunConfig, text: str) -> Sequence[str]:
    """Which settings the rest of a run will have otherwise; raises where that may not be."""
    before = epath.Path(config.model_dir, 'config.gin')
    if not before.exists() or not epath.Path(config.model_dir, 'checkpoints').is_dir():
        return ()
    with contextlib.closing(Checkpoints(config.model_dir, read_only=True)) as checkpoints:
        first = checkpoints.latest() or 0
    return config.check_resume(before.read_text(), text) if 0 < first < config.total_steps else ()


def made(
    folder: str,
    phase: str,
    role: str,
    adapter: lora.Adapter,
    *,
    base: dict[str, str],
    base_parameters: int,
    vocabulary: Mapping[str, str | None],
    source: str,
    config_text: str,
) -> None:
    """Fill `folder` as a finished run of one role leaves it, of an adapter that no run has trained.

    `base` is `Base.name`, `vocabulary` is RunVocabulary.about; `source` says where the adapter comes from.
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
    }
    rundir.imported(folder, about, source, config_text)


def _check_scale(model_dir: str, adapters: dict[str, dict[str, float]], states: dict[str, Any]) -> None:
    for role, adapter in _learned(states).items():
        if (before := lora.as_scale(adapters[role]['scale'])) != adapter.scale:
            was, now = (f'{x:g}' if isinstance(x, float | int) else 'of each layer' for x in (before, adapter.scale))
            raise UserError(
                f"MODEL_DIR '{model_dir}' is a run with LoRA's alpha / rank = {was}, now {now}; "
                'set LoraSpec.alpha as it was, or name another folder'
            )


def _learned(states: dict[str, Any]) -> dict[str, lora.Adapter]:
    """The adapter of each role."""
    return {role: state.adapter for role, state in states.items() if isinstance(state, TrainState)}
