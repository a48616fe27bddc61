"""The classes and functions that gin files can name without an import.

User code is imported by `from __gin__ import dynamic_registration`. The names below are stable: config.gin files of all
versions use them, so they do not follow when a class moves to another module.
"""

# ruff: noqa: UP045 (`Decay | None` outside of an annotation is a type error to pyright)

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Optional

import numpy as np
from annotated_types import Interval

from perl_jax import settings
from perl_jax.errors import UserError
from perl_jax.runs import resume
from perl_jax.settings import Decay, LearningRate, NonNegative, Positive


@functools.cache
def register() -> None:
    """Register them with gin; deferred until the first gin file is read, since importing them takes a second."""
    import gin.config

    from perl_jax.models import lora

    for module, configurables in named().items():
        for configurable in configurables:
            is_ours = inspect.isfunction(configurable) and module.startswith('perl_jax')
            if is_ours and not hasattr(configurable, settings.CHECKED):
                configurable = settings.checked(configurable)
            gin.external_configurable(configurable, module=module)
    gin.config.register_finalize_hook(check_finite)
    gin.config.register_finalize_hook(check_optimizers)
    gin.constant('lora.ALL_LINEAR', lora.ALL_LINEAR)
    gin.constant('lora.ATTENTION', lora.ATTENTION)


def named() -> Mapping[str, Sequence[Callable[..., Any]]]:
    """Return classes and functions by their module name in gin files."""
    import optax

    from perl_jax.data import datasets
    from perl_jax.evals import answering, infer
    from perl_jax.evals.judging import models
    from perl_jax.models import decoder, lora, t5
    from perl_jax.models.attention import rotary
    from perl_jax.optim import schedules, tuning
    from perl_jax.parallel import partitioning, rules
    from perl_jax.rewards import ensembles, sources
    from perl_jax.rl import kl, objective, sampling, shaping
    from perl_jax.runs import base, lineage
    from perl_jax.tasks.user_files import task as user_files
    from perl_jax.tokenizers import tokenizers
    from perl_jax.tools import exchange, sweep
    from perl_jax.tools.plan import programs
    from perl_jax.train import loop, policy, reward, sft

    return {
        # All three trainings, so that every command can read the config.gin of any run.
        'perl_jax.train_sft': [sft.train],
        'perl_jax.train_reward': [reward.train],
        'perl_jax.train_policy': [policy.train],
        'perl_jax.base': [base.BaseConfig],
        'perl_jax.data': [datasets.DatasetConfig],
        'perl_jax.files': [user_files.task],
        'perl_jax.lora': [lora.LoraSpec, lora.FullSpec],
        'perl_jax.partitioning': [partitioning.Partitioner, rules.standard_logical_axis_rules],
        'perl_jax.runs': [loop.RunConfig],
        'perl_jax.rewards': [sources.LearnedReward, sources.TextReward],
        'perl_jax.ensembles': [ensembles.mean, ensembles.minimum, ensembles.median, ensembles.lower_bound],
        'perl_jax.sampling': [sampling.SamplingConfig],
        'perl_jax.networks.decoder': [
            settings.checked(decoder.Decoder, config=decoder.DecoderConfig), decoder.DecoderConfig,
        ],
        'perl_jax.networks.t5': [settings.checked(t5.T5, config=t5.T5Config), t5.T5Config],
        'perl_jax.layers': [rotary.RopeScaling],
        'perl_jax.interop.hf': [lineage.network],
        'perl_jax.interop.tokenizers': [tokenizers.TokenizersVocabulary],
        **_algorithms(),
        'perl_jax.objective': [objective.Objective],
        'perl_jax.kl': [kl.KLConfig],
        'perl_jax.tuning': [tuning.Tuning],
        'perl_jax.schedules': [schedules.linear],
        'perl_jax.shaping': [shaping.whiten, shaping.clip, shaping.length, shaping.missing_eos],
        'perl_jax.evaluate': [answering.Answers],
        'perl_jax.infer': [infer.eval_policy, infer.eval_reward, infer.sample_policy, infer.answer_split],
        'perl_jax.judging.models': [models.ask, models.score],
        'perl_jax.exchange': [exchange.export_run, exchange.import_run],
        'perl_jax.plan.programs': [programs.sft, programs.reward, programs.policy],
        'perl_jax.sweep': [sweep.run, sweep.Stage],
        'optax': [
            optax.adafactor, optax.adam, optax.adamw, optax.sgd, optax.chain, optax.clip_by_global_norm,
            optax.constant_schedule, optax.linear_schedule, optax.polynomial_schedule, optax.exponential_decay,
            optax.cosine_decay_schedule, optax.warmup_constant_schedule, optax.warmup_cosine_decay_schedule,
            optax.warmup_exponential_decay_schedule,
        ],
    }  # fmt: skip


def default(name: str) -> Any:
    """Return the default of a setting, as the text of a config.gin would have it.

    Args:
      name: 'SCOPE/CONFIGURABLE.PARAMETER'.

    Returns:
      The default in the signature, a function as '@module.name'; resume.NOT_SET without one.
    """
    import gin.config

    register()
    selector, _, parameter = name.rpartition('/')[2].rpartition('.')
    try:
        configurable = gin.config._REGISTRY.get_match(selector)
        value = inspect.signature(configurable.wrapped).parameters[parameter].default if configurable else None
    except (KeyError, ValueError, TypeError):  # an ambiguous name, no signature, or no such parameter
        return resume.NOT_SET
    if configurable is None or value is inspect.Parameter.empty:
        return resume.NOT_SET
    if isinstance(dtype := getattr(value, 'dtype', None), np.dtype):  # jnp.float32
        return dtype.name
    if inspect.isroutine(value) or inspect.isclass(value):
        return f'@{value.__module__.rpartition(".")[2]}.{value.__name__}'
    return value


def check_finite(config: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Refuse infinities and NaN wherever they stand, a finalize hook of gin, which cannot read its own text of them.

    Args:
      config: {(scope, configurable): {argument: value}}.

    Raises:
      UserError: naming the macro or the argument.
    """
    for (scope, selector), bindings in config.items():
        for argument, value in bindings.items():
            if not _is_finite(value):
                name = scope if selector == 'gin.macro' else f'{selector.rpartition(".")[2]}.{argument}'
                raise UserError(f'{name} = {value!r}: give a finite number')


def _is_finite(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return all(map(_is_finite, items))


def check_optimizers(config: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
    """Check the settings of optax's optimizers, a finalize hook of gin: their own annotations have no ranges.

    Args:
      config: {(scope, configurable): {argument: value}}.

    Raises:
      UserError: naming the macro or the argument.
    """
    from gin.config import ConfigurableReference

    for (_, selector), bindings in config.items():
        optimizer = selector.rpartition('.')[2]
        ranges = _OPTIMIZERS.get(optimizer, {}) if selector.startswith('optax.') else {}
        for argument in ranges.keys() & bindings.keys():
            name, value = f'{optimizer}.{argument}', bindings[argument]
            if isinstance(value, ConfigurableReference) and value.selector == 'gin.macro':
                name, value = value.scoped_selector.partition('/')[0], copy.deepcopy(value)  # which evaluates it
            if isinstance(value, ConfigurableReference):  # such as a schedule, which is not called yet
                continue
            if problem := settings.find_problem(ranges[argument], value):
                raise UserError(name + problem)


_RATE = LearningRate | Callable[..., Any]  # or a schedule
_ADAM = {'learning_rate': _RATE, 'b1': Decay, 'b2': Decay, 'eps': NonNegative, 'eps_root': NonNegative}
_OPTIMIZERS: dict[str, dict[str, Any]] = {
    'adafactor': {
        'learning_rate': Optional[_RATE], 'min_dim_size_to_factor': settings.Natural, 'eps': NonNegative,
        'decay_rate': Annotated[float, Interval(gt=0, lt=1)], 'momentum': Optional[Decay], 'decay_offset': int,
        'clipping_threshold': Optional[Positive], 'weight_decay_rate': Optional[NonNegative],
        'multiply_by_parameter_scale': bool,
    },
    'adam': _ADAM,
    'adamw': _ADAM | {'weight_decay': NonNegative},
    'sgd': {'learning_rate': _RATE, 'momentum': Optional[Decay], 'nesterov': bool},
    'clip_by_global_norm': {'max_norm': Positive},
}  # fmt: skip


def _algorithms() -> dict[str, list[type]]:
    """Return the dataclass of each module in rl/algorithms/, so that new algorithms need no entry here."""
    from perl_jax.rl import algorithms

    classes_by_module = {}
    for module_info in pkgutil.iter_modules(algorithms.__path__):
        module = importlib.import_module(f'{algorithms.__name__}.{module_info.name}')
        classes = [x for x in vars(module).values() if dataclasses.is_dataclass(x) and x.__module__ == module.__name__]
        classes_by_module[f'perl_jax.algorithms.{module_info.name}'] = classes
    return classes_by_module
