"""LoRA adapters in PEFT's form: adapter_config.json and adapter_model.safetensors, written and read.

    lora/decoder/layers/self_attention/query/a [L, D, r]  <->  base_model.model.model.layers.I.self_attn.q_proj.lora_A.weight [r, D]
                                             b [L, r, H E] <->  .. lora_B.weight [H E, r]
    head/kernel [D]                                        <->  base_model.model.score.weight [1, D]

A policy is a CAUSAL_LM (T5: SEQ_2_SEQ_LM); a reward with its head is a SEQ_CLS, which transformers' classifiers with one
label read at a sequence's last token, as we do. Ranks may differ from layer to layer there: here all are padded with
zeros, on both sides, to the largest, where they stay zero whatever is trained. peft_config.py reads the configuration.
"""  # noqa: E501

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import trees
from perl_jax.errors import UserError
from perl_jax.interop import hf, hf_names, peft_config, safetensors
from perl_jax.models.lora import Adapter, Scale, scale_of
from perl_jax.models.t5 import T5

_WEIGHTS = 'adapter_model.safetensors'
_ROOT, _SCORE = 'base_model.model.', 'base_model.model.score.weight'
_PAIR = re.compile(r'(.+)\.lora_([AB])(?:\.[^.]+)?\.weight')  # between them the adapter's name, in some files
_COPY = re.compile(r'(.+?)(\.base_layer)?\.weight')
_WRAPPERS = re.compile(r'(^|(?<=\.))(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')  # of torch
_HEAD = re.compile(r'(score|classifier)(\.modules_to_save(\.[^.]+)?)?\.weight')
_Pairs = dict[tuple[str, str], tuple[str, safetensors.Entry]]
_FOREIGN = {  # what a tensor that is no pair belongs to
    'lora_embedding_': 'LoRA of the embedding (embed_tokens among target_modules)',
    'lora_magnitude_vector': 'use_dora',
    'lora_B.bias': 'lora_bias',
    'trainable_tokens': 'trainable_token_indices',
    'modules_to_save': 'modules_to_save',
    '.bias': 'bias',
}


def save(folder: str | os.PathLike, network: nn.Module, adapter: Adapter, base: str | None) -> str:
    """Write a LoRA adapter as PEFT loads it.

    Args:
      folder: gets adapter_config.json and adapter_model.safetensors; it is made if it is not there.
      network: what the adapter is for.
      adapter: with `lora`; a reward's head becomes a classifier's.
      base: the original model, for base_model_name_or_path: its folder, or its name on the hub, with or without hf://.

    Returns:
      PEFT's task_type.

    Raises:
      UserError: full tuning, or a T5 reward, which PEFT has no form for.
    """
    from safetensors.numpy import save_file

    if adapter.lora is None:
        raise UserError('a fully tuned model is no LoRA adapter; export it with --format=hf')
    if adapter.head is not None and isinstance(network, T5):
        raise UserError("transformers' T5 classifier has another head than a reward; it cannot be exported there")
    flat = {k: np.asarray(v) for k, v in trees.flatten(jax.device_get(adapter.lora)).items()}
    tensors, ranks, alphas, left_out = {}, {}, {}, False
    for leaf, names in _modules(network, flat).items():
        a, b = flat[f'{leaf}/a'], flat[f'{leaf}/b']
        scale = np.broadcast_to(scale_of(adapter.scale, leaf), (*a.shape[:-2], 1, 1))
        for i, name in enumerate(names):
            layer = i if a.ndim == 3 else ()
            rank = _rank(a[layer], b[layer])
            if not rank:
                left_out = True
                continue
            alpha = float(scale[layer].item()) * rank
            ranks[name], alphas[name] = rank, int(alpha) if alpha == int(alpha) else alpha
            tensors[f'{_ROOT}{name}.lora_A.weight'] = np.ascontiguousarray(a[layer][:, :rank].T)
            tensors[f'{_ROOT}{name}.lora_B.weight'] = np.ascontiguousarray(b[layer][:rank].T)
    if not tensors:
        raise UserError('the adapter is zero in every layer; there is nothing to export')
    task = 'SEQ_2_SEQ_LM' if isinstance(network, T5) else 'CAUSAL_LM'
    if adapter.head is not None:
        task = 'SEQ_CLS'
        tensors[_SCORE] = np.asarray(jax.device_get(adapter.head['kernel']))[None]
    rank, alpha = (collections.Counter(each.values()).most_common(1)[0][0] for each in (ranks, alphas))
    config = {
        'peft_type': 'LORA',
        'task_type': task,
        'base_model_name_or_path': base and base.removeprefix(hf.HUB),
        'r': rank,
        'lora_alpha': alpha,
        'rank_pattern': {name: each for name, each in ranks.items() if each != rank},
        'alpha_pattern': {name: each for name, each in alphas.items() if each != alpha},
        'lora_dropout': adapter.dropout,
        'bias': 'none',
        'target_modules': _targets(network, list(ranks), match_paths=left_out),
        'modules_to_save': ['score'] if adapter.head is not None else None,
        'inference_mode': True,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / _WEIGHTS, {'format': 'pt'})
    (folder / peft_config.FILE).write_text(json.dumps(config, indent=2) + '\n')
    return task


def load(folder: str | os.PathLike, network: nn.Module, shapes: PyTree, base: PyTree = None) -> Adapter:
    """Read an adapter that PEFT wrote, for a base with these shapes (partitioning.abstract), as float32 host arrays.

    Args:
      base: its parameters, to which copies of base weights in the file, as PEFT adds with lm_head, are compared.

    Raises:
      UserError: no adapter there; one that is no plain LoRA; tensors that are missing, extra or do not fit.
    """
    folder = pathlib.Path(folder)
    config, path = peft_config.read(folder), _file(folder)
    flat = trees.flatten(shapes)
    leaves = hf_names.layers(network, flat)
    known = {name for names in leaves.values() for name in names}
    pairs, score, copies = _sort(path, config, safetensors.header(path), known)
    if not pairs:
        raise UserError(f'{path}: has no pair of matrices, lora_A and lora_B, of any layer of this model')
    # Configurations go by the base's own names, in which a text model may lie inside another one.
    full = {module: name for (module, _), (name, _) in pairs.items()}
    width = max(config.rank_of(name) for name in full.values())
    lora, scales = {}, {}
    for leaf, names in leaves.items():
        if not any(name in full for name in names):
            continue
        *stack, fan_in, fan_out = flat[f'{leaf}/kernel'].shape
        a = np.zeros((len(names), fan_in, width), np.float32)
        b = np.zeros((len(names), width, fan_out), np.float32)
        for i, name in enumerate(names):
            if name in full or config.targets(name):
                rank = config.rank_of(full.get(name, name))
                a[i, :, :rank] = _take(pairs, name, 'A', (rank, fan_in), path).T
                b[i, :rank] = _take(pairs, name, 'B', (fan_out, rank), path).T
        each = tuple(config.scale_of(full.get(name, name)) for name in names)
        scales[leaf] = each if stack else each[0]
        lora |= {f'{leaf}/a': a if stack else a[0], f'{leaf}/b': b if stack else b[0]}
    for name, entry in copies.items():
        _check_copy(path, network, base, name, entry)
    head = None
    if config.task == 'SEQ_CLS':
        if score is None:
            raise UserError(f'{path}: lacks tensor {_SCORE}')
        head = {'kernel': _fit(score, _SCORE, (1, network.config.emb_dim), path)[0]}
    tree = trees.unflatten(lora)
    return Adapter(lora=tree, head=head, scale=_plain_scale(scales), dropout=config.dropout)


def base_of(folder: str | os.PathLike) -> str:
    """What adapter_config.json says the adapter is for: a folder, or hf://OWNER/NAME."""
    config = peft_config.read(pathlib.Path(folder))
    name, revision = config.fields.get('base_model_name_or_path'), config.fields.get('revision')
    if not name:
        raise UserError(f'{config.path}: names no base model; add --gin.INITIAL_CHECKPOINT_PATH="\'PATH\'"')
    if os.path.isdir(name):
        return name
    return f'hf://{name}@{revision}' if revision else f'hf://{name}'


def _modules(network: nn.Module, lora: dict[str, Any]) -> dict[str, list[str]]:
    return hf_names.layers(network, {f'{path.removesuffix("/a")}/kernel': 0 for path in lora if path.endswith('/a')})


def _rank(a: np.ndarray, b: np.ndarray) -> int:
    """How many columns of A and rows of B are not padding, which is zero on both sides."""
    used_ranks = np.flatnonzero(a.any(0) | b.any(1))
    return int(used_ranks[-1]) + 1 if used_ranks.size else 0


def _targets(network: nn.Module, names: list[str], match_paths: bool) -> list[str]:
    """The last part of each name where that says it all; whole names where some layers have no pair, and of T5."""
    if match_paths or isinstance(network, T5):
        return sorted(names)
    return sorted({name.rpartition('.')[2] for name in names})


def _file(folder: pathlib.Path) -> pathlib.Path:
    if not (path := folder / _WEIGHTS).is_file() and (folder / 'adapter_model.bin').is_file():
        raise UserError(
            f'{folder}: only adapter_model.bin is there; convert it there: cd {folder} && python -c "import '
            'safetensors.torch, torch; '
            f"safetensors.torch.save_file(torch.load('adapter_model.bin'), '{_WEIGHTS}')\""
        )
    return path


def _plain(name: str) -> str:
    """A module's name as hf_names has it, whatever it was wrapped in."""
    name = name.replace('model.language_model.', 'model.').replace('language_model.model.', 'model.')
    return f'model.{name}' if name.startswith('layers.') else name


def _sort(
    path: pathlib.Path, config: peft_config.PeftConfig, entries: dict[str, safetensors.Entry], known: set[str]
) -> tuple[_Pairs, safetensors.Entry | None, dict[str, safetensors.Entry]]:
    """The pairs of the file by module and side, each with its module's full name; the head; copies of base weights."""
    pairs: _Pairs = {}
    score, copies = None, {}
    for name, entry in entries.items():
        short = _WRAPPERS.sub('', name).removeprefix(_ROOT)
        match, copy = _PAIR.fullmatch(short), _COPY.fullmatch(short)
        if match and (module := _plain(match[1])) in known:
            if not config.targets(match[1]):
                raise UserError(f'{path}: {name} is of a module that {peft_config.FILE} does not target')
            if (module, match[2]) in pairs:
                raise UserError(f'{path}: {name} is there twice under two spellings')
            pairs[module, match[2]] = (match[1], entry)
        elif config.task == 'SEQ_CLS' and _HEAD.fullmatch(short) and score is None:
            score = entry
        elif copy and _plain(copy[1]) in ('model.embed_tokens', 'shared', 'lm_head'):
            copies[f'{_plain(copy[1])}.weight'] = entry
        elif match and match[1].rpartition('.')[2] == 'lm_head':
            raise UserError(f"{path}: {name}: this model's output matrix is its embedding, which gets no LoRA here")
        else:
            option = next((f', of {option},' for fragment, option in _FOREIGN.items() if fragment in short), '')
            raise UserError(f'{path}: tensor {name}{option} has no place in this model')
    return pairs, score, copies


def _check_copy(path: pathlib.Path, network: nn.Module, base: PyTree, name: str, entry: safetensors.Entry) -> None:
    """PEFT puts the base's embeddings into the file where they are targets; it would load them over the base's."""
    base_leaves = trees.flatten(base or {})
    leaf = next((leaf for leaf in base_leaves if hf_names.tensor_names(network, leaf) == [name]), None)
    if leaf is None and name == 'lm_head.weight':  # tied
        leaf, name = 'token_embedder/embedding', 'model.embed_tokens.weight'
    if leaf in base_leaves:
        want = np.asarray(jax.device_get(base_leaves[leaf]))
        want = want.T if hf_names.is_transposed(leaf) else want
        if want.shape == entry.shape and np.array_equal(entry.read().astype(want.dtype), want):
            return
    raise UserError(f"{path}: {name} is there whole and is not the base's; only adapters can be imported")


def _take(pairs: _Pairs, module: str, side: str, shape: tuple[int, ...], path: pathlib.Path) -> np.ndarray:
    name = f'{_ROOT}{module}.lora_{side}.weight'
    if (module, side) not in pairs:
        raise UserError(f'{path}: lacks tensor {name}')
    entry, axis = pairs[module, side][1], 0 if side == 'A' else 1
    if len(entry.shape) == 2 and entry.shape[axis] != shape[axis]:
        raise UserError(
            f'{path}: {name} is of rank {entry.shape[axis]}, and r and rank_pattern in {peft_config.FILE} make it '
            f'{shape[axis]}; correct them there'
        )
    return _fit(entry, name, shape, path)


def _fit(entry: safetensors.Entry, name: str, shape: tuple[int, ...], path: pathlib.Path) -> np.ndarray:
    if entry.shape != shape:
        raise UserError(f'{path}: {name} has shape {list(entry.shape)}, the model wants {list(shape)}')
    array = entry.read().astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f'{path}: {name} has numbers that are not finite; take a checkpoint from before they came')
    return array


def _plain_scale(scales: dict[str, Any]) -> Scale:
    """One number where all layers share it."""
    values = {x for each in scales.values() for x in (each if isinstance(each, tuple) else (each,))}
    return values.pop() if len(values) == 1 else tuple(sorted(scales.items()))
