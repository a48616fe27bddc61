"""perl_jax: PERL (parameter efficient reinforcement learning from human feedback) in JAX.

The names in `__all__` are the public API. Each is imported on first use, so that `import perl_jax` is fast.
examples/rl_in_40_lines.py uses them together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = '0.1.0'

__all__ = [
    # networks and trainable parameters
    'Decoder', 'DecoderConfig', 'T5', 'T5Config', 'init_params', 'LoraSpec', 'FullSpec', 'Adapter', 'bind', 'merge',
    # weights and tokenizers
    'load_base', 'load_tokenizer', 'save_hf', 'save_peft',
    # batches
    'text_dataset', 'Prompts', 'Responses', 'Rollout', 'Experience',
    # sampling and reinforcement learning
    'SamplingConfig', 'sample', 'Algorithm', 'Reinforce', 'RLOO', 'GRPO', 'PPO', 'KLConfig', 'Objective', 'Tuning',
    'Roles', 'make_learner', 'learn',
    # rewards
    'score', 'LearnedReward', 'TextReward',
    # devices, errors
    'Partitioner', 'UserError',
]  # fmt: skip

_LOCATIONS = {
    'Decoder': 'models.decoder:Decoder',
    'DecoderConfig': 'models.decoder:DecoderConfig',
    'T5': 'models.t5:T5',
    'T5Config': 'models.t5:T5Config',
    'init_params': 'parallel.partitioning:init_params',
    'LoraSpec': 'models.lora:LoraSpec',
    'FullSpec': 'models.lora:FullSpec',
    'Adapter': 'models.lora:Adapter',
    'bind': 'models.lora:bind',
    'merge': 'models.lora:merge',
    'load_base': 'runs.base:load_base',
    'load_tokenizer': 'tokenizers.vocabularies:vocabulary',
    'save_hf': 'interop.hf:save',
    'save_peft': 'interop.peft:save',
    'text_dataset': 'data.texts:dataset',
    'Prompts': 'types:Prompts',
    'Responses': 'types:Responses',
    'Rollout': 'types:Rollout',
    'Experience': 'types:Experience',
    'SamplingConfig': 'rl.sampling:SamplingConfig',
    'sample': 'rl.sampling:sample',
    'Algorithm': 'rl.algorithms:Algorithm',
    'Reinforce': 'rl.algorithms.reinforce:Reinforce',
    'RLOO': 'rl.algorithms.rloo:RLOO',
    'GRPO': 'rl.algorithms.grpo:GRPO',
    'PPO': 'rl.algorithms.ppo:PPO',
    'KLConfig': 'rl.kl:KLConfig',
    'Objective': 'rl.objective:Objective',
    'Tuning': 'optim.tuning:Tuning',
    'Roles': 'types:Roles',
    'make_learner': 'rl.learner:make_learner',
    'learn': 'rl.learner:learn',
    'score': 'rewards.scoring:score',
    'LearnedReward': 'rewards.sources:LearnedReward',
    'TextReward': 'rewards.sources:TextReward',
    'Partitioner': 'parallel.partitioning:Partitioner',
    'UserError': 'errors:UserError',
}

if TYPE_CHECKING:  # the same for type checkers and the API reference; tests/test_public.py compares
    from perl_jax.data.texts import dataset as text_dataset
    from perl_jax.errors import UserError
    from perl_jax.interop.hf import save as save_hf
    from perl_jax.interop.peft import save as save_peft
    from perl_jax.models.decoder import Decoder, DecoderConfig
    from perl_jax.models.lora import Adapter, FullSpec, LoraSpec, bind, merge
    from perl_jax.models.t5 import T5, T5Config
    from perl_jax.optim.tuning import Tuning
    from perl_jax.parallel.partitioning import Partitioner, init_params
    from perl_jax.rewards.scoring import score
    from perl_jax.rewards.sources import LearnedReward, TextReward
    from perl_jax.rl.algorithms import Algorithm
    from perl_jax.rl.algorithms.grpo import GRPO
    from perl_jax.rl.algorithms.ppo import PPO
    from perl_jax.rl.algorithms.reinforce import Reinforce
    from perl_jax.rl.algorithms.rloo import RLOO
    from perl_jax.rl.kl import KLConfig
    from perl_jax.rl.learner import learn, make_learner
    from perl_jax.rl.objective import Objective
    from perl_jax.rl.sampling import SamplingConfig, sample
    from perl_jax.runs.base import load_base
    from perl_jax.tokenizers.vocabularies import vocabulary as load_tokenizer
    from perl_jax.types import Experience, Prompts, Responses, Roles, Rollout


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'perl_jax' has no attribute '{name}'")
    module, _, attribute = _LOCATIONS[name].partition(':')
    value = globals()[name] = getattr(importlib.import_module(f'perl_jax.{module}'), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
