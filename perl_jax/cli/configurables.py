"""What gin files may name without importing it. For a user's own: `from __gin__ import dynamic_registration`.

The names are stable: a config.gin of any version says them, wherever a class lies today.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any


@functools.cache
def register() -> None:
    """Have gin know them; not before the first gin file, since to import them all takes a second."""
    import gin

    from perl_jax.models import lora

    for module, things in named().items():
        for thing in things:
            gin.external_configurable(thing, module=module)
    gin.constant('lora.ALL_LINEAR', lora.ALL_LINEAR)
    gin.constant('lora.ATTENTION', lora.ATTENTION)


def named() -> Mapping[str, Sequence[Callable[..., Any]]]:
    """Classes and functions by the module that gin files call theirs."""
    import optax

    from perl_jax.data import datasets
    from perl_jax.evals import answering, infer
    from perl_jax.evals.judging import models
    from perl_jax.models import attention, decoder, lora, t5
    from perl_jax.optim import schedules, tuning
    from perl_jax.parallel import partitioning
    from perl_jax.rewards import ensembles, sources
    from perl_jax.rl import kl, objective, sampling, shaping
    from perl_jax.runs import base, lineage
    from perl_jax.tokenizers import tokenizers
    from perl_jax.tools import exchange, sweep
    from perl_jax.tools.plan import programs
    from perl_jax.train import loop, policy, reward, sft

    return {
        # All three, so that config.gin of any run can be read by any command.
        'perl_jax.train_sft': [sft.train],
        'perl_jax.train_reward': [reward.train],
        'perl_jax.train_policy': [policy.train],
        'perl_jax.base': [base.BaseConfig],
        'perl_jax.data': [datasets.DatasetConfig],
        'perl_jax.lora': [lora.LoraSpec, lora.FullSpec],
        'perl_jax.partitioning': [partitioning.Partitioner, partitioning.standard_logical_axis_rules],
        'perl_jax.runs': [loop.RunConfig],
        'perl_jax.rewards': [sources.LearnedReward, sources.TextReward],
        'perl_jax.ensembles': [ensembles.mean, ensembles.minimum, ensembles.median, ensembles.lower_bound],
        'perl_jax.sampling': [sampling.SamplingConfig],
        'perl_jax.networks.decoder': [decoder.Decoder, decoder.DecoderConfig],
        'perl_jax.networks.t5': [t5.T5, t5.T5Config],
        'perl_jax.layers': [attention.RopeScaling],
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


def _algorithms() -> dict[str, list[type]]:
    """The dataclass of each page of rl/algorithms/, so that a new page is named nowhere else."""
    from perl_jax.rl import algorithms

    pages = {}
    for page in pkgutil.iter_modules(algorithms.__path__):
        module = importlib.import_module(f'{algorithms.__name__}.{page.name}')
        classes = [x for x in vars(module).values() if dataclasses.is_dataclass(x) and x.__module__ == module.__name__]
        pages[f'perl_jax.algorithms.{page.name}'] = classes
    return pages
