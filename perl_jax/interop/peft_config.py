"""What adapter_config.json says: each field of PEFT's LoraConfig is understood, does no harm, or is refused by name."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.settings import Count, Decay, Natural, Real

FILE = 'adapter_config.json'
TASKS = (None, 'CAUSAL_LM', 'SEQ_2_SEQ_LM', 'SEQ_CLS')
_UNDERSTOOD = {
    'peft_type', 'task_type', 'base_model_name_or_path', 'revision', 'r', 'lora_alpha', 'lora_dropout', 'use_rslora',
    'rank_pattern', 'alpha_pattern', 'target_modules', 'exclude_modules', 'layers_to_transform', 'layers_pattern',
    'modules_to_save', 'init_lora_weights', 'bias',
}  # fmt: skip
_HARMLESS = {
    'inference_mode': 'whether PEFT lets gradients flow',
    'auto_mapping': "how PEFT finds the base's class where there is no task_type",
    'peft_version': 'who wrote it',
    'megatron_core': 'the name of a package that megatron_config, which is refused, would use',
    'qalora_group_size': 'read with use_qalora alone, which is refused',
    'runtime_config': 'where PEFT computes',
    'ensure_weight_tying': 'of the adapters of embeddings, which are refused',
    'eva_config': 'read when A and B are first drawn; init_lora_weights says whether the base was changed by that',
    'corda_config': 'the same',
    'lora_ga_config': 'the same',
}
_NUMBERS: dict[str, Any] = {
    'r': Count, 'lora_alpha': Real, 'lora_dropout': Decay,
    'rank_pattern': Mapping[str, Count] | None, 'alpha_pattern': Mapping[str, Real] | None,
}  # fmt: skip
_Texts = str | Sequence[str] | None
_Layers = Natural | Sequence[Natural] | None
_CHOICES: dict[str, Any] = {
    'use_rslora': bool | None, 'base_model_name_or_path': str | None, 'revision': str | None,
    'modules_to_save': Sequence[str] | None, 'target_modules': _Texts, 'exclude_modules': _Texts,
    'layers_pattern': _Texts, 'layers_to_transform': _Layers,
}  # fmt: skip
# How A and B were first drawn does not matter, as they are in the file, unless that took something off the base.
_INITS = ('gaussian', 'eva', 'mica', 'orthogonal')
_CHANGES_THE_BASE = ('pissa', 'olora', 'corda', 'lora_ga')
_HEADS = ('score', 'classifier')  # PEFT saves both names with each SEQ_CLS


@dataclasses.dataclass(frozen=True)
class PeftConfig:
    """The settings of an adapter_config.json that determine what its adapter computes.

    Attributes:
      path: of the file.
      fields: all of the file's fields.
      rank: r, where `rank_pattern` sets no other.
      alpha: lora_alpha, where `alpha_pattern` sets no other.
      dropout: lora_dropout.
      task: task_type; None if the file has none.
    """

    path: pathlib.Path
    fields: Mapping[str, Any]
    rank: int
    alpha: float
    dropout: float
    task: str | None

    def rank_of(self, module: str) -> int:
        """The rank of one module, by its full name in the base."""
        return self._pattern('rank_pattern', module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor of A B of one module, by its full name in the base."""
        rank, alpha = self.rank_of(module), self._pattern('alpha_pattern', module, self.alpha)
        return alpha / (math.sqrt(rank) if self.fields.get('use_rslora') else rank)

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        """The first key that matches the end of the name counts, as PEFT's get_pattern_key has it."""
        for pattern, value in (self.fields.get(key) or {}).items():
            if re.match(rf'(.*\.)?({pattern})$', module):
                return value
        return default

    def targets(self, module: str) -> bool:
        """Whether PEFT puts a pair of matrices on a module, by its full name in the base."""
        target_modules, excluded_modules = self.fields.get('target_modules'), self.fields.get('exclude_modules')
        if excluded_modules and _matches(excluded_modules, module):
            return False
        if target_modules is None or target_modules == 'all-linear':
            return True
        if not _matches(target_modules, module):
            return False
        layers = self.fields.get('layers_to_transform')
        if isinstance(target_modules, str) or module in target_modules or layers is None or layers == []:
            return True
        patterns = self.fields.get('layers_pattern') or [r'[^.]*']
        patterns = [patterns] if isinstance(patterns, str) else patterns
        matches = (re.match(rf'(?:^|.*?\.){pattern}\.(\d+)\.', module) for pattern in patterns)
        match = next(filter(None, matches), None)
        return match is not None and int(match[1]) in ([layers] if isinstance(layers, int) else layers)


def read(folder: pathlib.Path) -> PeftConfig:
    """Read and check the configuration of an adapter.

    Raises:
      UserError: there is none; an option that changes what is computed and that is not understood, by its name.
    """
    path = folder / FILE
    fields = json_files.read(path, remedy=f'a PEFT adapter has an {FILE}; get it again')
    if (kind := fields.get('peft_type')) != 'LORA':
        raise UserError(f"{path}: peft_type = {kind!r} is not supported; only 'LORA' is")
    for key, value in fields.items():
        neutral = value is None or value is False or value in ({}, [], '')
        if key not in _UNDERSTOOD and key not in _HARMLESS and not neutral:
            raise UserError(f'{path}: {key} = {value!r} is not supported; only plain LoRA is')
    _check_choices(path, fields)
    _check_init(path, fields.get('init_lora_weights', True))
    numbers = {'r': 8, 'lora_alpha': 8, 'lora_dropout': 0.0} | fields
    json_files.check(numbers, path, _NUMBERS)
    patterns = fields.get('alpha_pattern') or {}
    alphas = {'lora_alpha': numbers['lora_alpha']} | {f'alpha_pattern[{key!r}]': patterns[key] for key in patterns}
    if zeros := [name for name, alpha in alphas.items() if alpha == 0]:
        raise UserError(f'{path}: {zeros[0]} = 0 would leave the adapter out; give a number other than 0')
    for key in 'rank_pattern', 'alpha_pattern':
        for pattern in fields.get(key) or {}:
            _check_regex(path, key, pattern)
    rank, alpha, dropout = (numbers[key] for key in ('r', 'lora_alpha', 'lora_dropout'))
    return PeftConfig(path, fields, rank, float(alpha), float(dropout), fields.get('task_type'))


def _check_choices(path: pathlib.Path, fields: dict[str, Any]) -> None:
    if (task := fields.get('task_type')) not in TASKS:
        raise UserError(f'{path}: task_type = {task!r} is not supported; there are {", ".join(filter(None, TASKS))}')
    if (bias := fields.get('bias', 'none')) != 'none':
        raise UserError(f"{path}: bias = {bias!r} is not supported; only 'none' is")
    json_files.check(fields, path, _CHOICES)
    saved = fields.get('modules_to_save') or []
    if not set(saved) <= set(_HEADS if task == 'SEQ_CLS' else ()):
        raise UserError(f'{path}: modules_to_save = {saved!r} is not supported, but for the head of a SEQ_CLS')
    for key in 'target_modules', 'exclude_modules', 'layers_pattern':
        value = fields.get(key)
        if isinstance(value, str) and value not in ('', 'all-linear'):
            _check_regex(path, key, value)
    layers = fields.get('layers_to_transform')
    if layers is not None and isinstance(fields.get('target_modules'), str):
        raise UserError(f'{path}: layers_to_transform goes with a list of target_modules alone, as in PEFT')


def _check_init(path: pathlib.Path, init: Any) -> None:
    kind = init.lower() if isinstance(init, str) else init
    if kind is None or isinstance(kind, bool) or kind in _INITS or kind == 'true':
        return
    remedy = ''
    if isinstance(kind, str) and kind.startswith(_CHANGES_THE_BASE):
        remedy = ' as it changes the base; save it as plain LoRA, with path_initial_model_for_weight_conversion'
    elif isinstance(kind, str) and kind.startswith('loftq'):
        remedy = ' as it changes the base; merge it in PEFT (merge_and_unload, save_pretrained), and import --format=hf'
    raise UserError(f'{path}: init_lora_weights = {init!r} is not supported{remedy}')


def _check_regex(path: pathlib.Path, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f'{path}: {key}: {pattern!r} is no regular expression: {error}') from error


def _matches(modules: str | list[str], module: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, module) is not None
    return any(module == name or module.endswith(f'.{name}') for name in modules)
