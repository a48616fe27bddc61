"""LoRA adapters in PEFT's form: adapter_config.json and adapter_model.safetensors, written and read.

    lora/decoder/layers/self_attention/query/a [L, D, r]  <->  base_model.model.model.layers.I.self_attn.q_proj.lora_A.weight [r, D]
                                             b [L, r, H E] <->  .. lora_B.weight [H E, r]
    head/kernel [D]                                        <->  base_model.model.score.weight [1, D]

A policy is a CAUSAL_LM (T5: SEQ_2_SEQ_LM); a reward with its head is a SEQ_CLS, which transformers' classifiers with one
label read at a sequence's last token, as we do.
"""  # noqa: E501

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import PyTree

from perl_jax.errors import UserError
from perl_jax.interop import hf_names, safetensors
from perl_jax.lora import Adapter
from perl_jax.networks.t5 import T5

_CONFIG, _WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
_ROOT, _SCORE = 'base_model.model.', 'base_model.model.score.weight'


def save(folder: str | os.PathLike, network: nn.Module, adapter: Adapter, base: str | None) -> None:
    """Write an adapter; `base` is the name or folder of the original model, for base_model_name_or_path.

    Raises:
      UserError: full tuning, or a T5 reward, which PEFT has no form for.
    """
    from safetensors.numpy import save_file

    if adapter.lora is None:
        raise UserError('a fully tuned model is no LoRA adapter; export it with --format=hf')
    if adapter.head is not None and isinstance(network, T5):
        raise UserError("transformers' T5 classifier has another head than a reward; it cannot be exported there")
    flat = {k: np.asarray(v) for k, v in traverse_util.flatten_dict(jax.device_get(adapter.lora), sep='/').items()}
    modules = _modules(network, flat)
    tensors, rank = {}, 0
    for leaf, names in modules.items():
        a, b = flat[f'{leaf}/a'], flat[f'{leaf}/b']
        rank = a.shape[-1]
        for i, name in enumerate(names):
            one_a, one_b = (a[i], b[i]) if a.ndim == 3 else (a, b)
            tensors[f'{_ROOT}{name}.lora_A.weight'] = np.ascontiguousarray(one_a.T)
            tensors[f'{_ROOT}{name}.lora_B.weight'] = np.ascontiguousarray(one_b.T)
    task = 'SEQ_2_SEQ_LM' if isinstance(network, T5) else 'CAUSAL_LM'
    if adapter.head is not None:
        task = 'SEQ_CLS'
        tensors[_SCORE] = np.asarray(jax.device_get(adapter.head['kernel']))[None]
    alpha = adapter.scale * rank
    config = {
        'peft_type': 'LORA',
        'task_type': task,
        'base_model_name_or_path': base,
        'r': rank,
        'lora_alpha': int(alpha) if alpha == int(alpha) else alpha,
        'lora_dropout': adapter.dropout,
        'bias': 'none',
        'target_modules': _targets(network, modules),
        'modules_to_save': ['score'] if adapter.head is not None else None,
        'inference_mode': True,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, {'format': 'pt'})
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def load(folder: str | os.PathLike, network: nn.Module, shapes: PyTree) -> Adapter:
    """Read an adapter that PEFT wrote, for a base with these shapes (partitioning.abstract), as float32 host arrays.

    Raises:
      UserError: no adapter there; one that is no plain LoRA; tensors that are missing, extra or do not fit.
    """
    folder = pathlib.Path(folder)
    config = _read_config(folder / _CONFIG)
    rank = config['r']
    scale = config['lora_alpha'] / (rank**0.5 if config.get('use_rslora') else rank)
    found = safetensors.header(folder / _WEIGHTS)
    flat = traverse_util.flatten_dict(shapes, sep='/')
    lora: dict[str, Any] = {}
    for leaf, names in hf_names.layers(network, flat).items():
        present = [f'{_ROOT}{name}.lora_A.weight' in found for name in names]
        if not any(present):
            continue
        if not all(present):
            raise UserError(f'{folder}: {leaf} is adapted in some layers only; here all or none are')
        *stack, fan_in, fan_out = flat[f'{leaf}/kernel'].shape
        for side, shape in ('A', (rank, fan_in)), ('B', (fan_out, rank)):
            parts = [_take(found, f'{_ROOT}{name}.lora_{side}.weight', shape, folder).T for name in names]
            lora[f'{leaf}/{side.lower()}'] = np.stack(parts) if stack else parts[0]
    head = None
    if config['task_type'] == 'SEQ_CLS':
        head = {'kernel': _take(found, _SCORE, (1, network.config.emb_dim), folder)[0]}
    if found:
        raise UserError(f'{folder}/{_WEIGHTS}: tensor {min(found)} ({len(found)} in all) has no place in this model')
    dropout = config.get('lora_dropout', 0.0)
    return Adapter(lora=traverse_util.unflatten_dict(lora, sep='/'), head=head, scale=scale, dropout=dropout)


def base_of(folder: str | os.PathLike) -> str:
    """What adapter_config.json says the adapter is for: a folder, or hf://OWNER/NAME."""
    path = pathlib.Path(folder) / _CONFIG
    name = _read_config(path).get('base_model_name_or_path')
    if not name:
        raise UserError(f'{path}: names no base model; add --gin.INITIAL_CHECKPOINT_PATH="\'PATH\'"')
    return name if os.path.isdir(name) else f'hf://{name}'


def _modules(network: nn.Module, lora: dict[str, Any]) -> dict[str, list[str]]:
    return hf_names.layers(network, {f'{path.removesuffix("/a")}/kernel': 0 for path in lora if path.endswith('/a')})


def _targets(network: nn.Module, modules: dict[str, list[str]]) -> list[str]:
    """The last part of each name where that says it all, which it does for stacked layers; else whole names."""
    names = [name for each in modules.values() for name in each]
    if isinstance(network, T5):
        return sorted(names)
    return sorted({name.rpartition('.')[2] for name in names})


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f'{path}: cannot be read; a PEFT adapter has an {_CONFIG}') from error
    except ValueError as error:
        raise UserError(f'{path}: not JSON ({error})') from error
    wanted = {'peft_type': 'LORA', 'bias': 'none', 'use_dora': False, 'fan_in_fan_out': False}
    for key, plain in (wanted | {'rank_pattern': {}, 'alpha_pattern': {}}).items():
        if (value := config.get(key) or plain) != plain:
            raise UserError(f'{path}: {key} = {value!r} is not supported; only plain LoRA is')
    for key in ('r', 'lora_alpha', 'task_type'):
        if key not in config:
            raise UserError(f'{path}: {key} is missing')
    return config


def _take(found: dict[str, Any], name: str, shape: tuple[int, ...], folder: pathlib.Path) -> np.ndarray:
    entry = found.pop(name, None)
    if entry is None:
        raise UserError(f'{folder}/{_WEIGHTS}: lacks tensor {name}')
    if entry.shape != shape:
        raise UserError(f'{folder}/{_WEIGHTS}: {name} has shape {list(entry.shape)}, the model wants {list(shape)}')
    return entry.read().astype(np.float32)
