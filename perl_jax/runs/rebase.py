"""The adapters of a run and of the runs before it as one adapter, on weights that others can load.

    origin -- SFT's adapter --> base of the policy -- the policy's adapter      W + s1 A1 B1 + s2 A2 B2
    origin -- [A1 A2], [s1 B1; s2 B2] -------------------------------------->   the same, exactly
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import trees
from perl_jax.errors import UserError
from perl_jax.interop import hf, t5x
from perl_jax.interop.hf_families import TEXT_OF
from perl_jax.models import averaging
from perl_jax.models.description import describe, difference
from perl_jax.models.lora import Adapter
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs import finished, lineage, rundir
from perl_jax.runs.base import BaseConfig

_OUTPUT = 'decoder/logits_dense/kernel'  # a classifier has none


def for_origin(model_dir: str, adapter: Adapter) -> tuple[Adapter, str]:
    """The adapter that leads from the weights behind all runs to what this one computes; and those weights.

    Raises:
      UserError: a run on the way was full tuning, or the weights are no Hugging Face checkpoint.
    """
    *runs, weights = lineage.chain(model_dir)
    if not hf.is_checkpoint(weights):
        nearest = next((run for run in runs[1:] if not _is_copy(run)), None)
        raise UserError(f"export: '{weights}' is no Hugging Face checkpoint; {_how_to_make(weights, nearest)}")
    return _joined(runs, adapter), weights


def onto(
    model_dir: str, adapter: Adapter, folder: str, network: nn.Module, partitioner: Partitioner, now: str | None
) -> Adapter:
    """The adapter that leads from the weights in `folder` to what this run computes.

    The folder holds those of any step of the way: the run's own base, or what lies behind it. A reward's may be in a
    classifier with one label too, whose head gives way to the reward's.

    Args:
      now: where the run's base lies, if it was moved.

    Raises:
      UserError: it holds other weights than all of these, or is of another network.
    """
    *runs, _ = lineage.chain(model_dir)
    is_classifier = adapter.head is not None and hf.is_classifier(folder)
    theirs = _weights(folder, network, partitioner, is_classifier)
    for i, run in enumerate(runs):
        ours = bases.named(network, _base(run), partitioner, now if i == 0 else None).params
        if _alike(folder, ours, theirs, but=(_OUTPUT,) if is_classifier else ()):
            return _joined(runs[: i + 1], adapter)
    here = f"export: --base: '{folder}' does not hold the weights that '{model_dir}' was trained on, "
    here += f"'{_base(model_dir)['path']}'"
    if is_classifier:
        raise UserError(f'{here}; a reward that was exported with --format=hf has its adapter in it already')
    raise UserError(f'{here}; export those with --format=hf')


def _weights(folder: str, network: nn.Module, partitioner: Partitioner, is_classifier: bool) -> PyTree:
    """The parameters in a folder that --base names, for which its errors are."""
    try:
        theirs, ours = describe(hf.network(folder)), describe(network)
        if key := difference(theirs, ours):
            differs = f'{key} is {theirs[key]!r} there and {ours[key]!r} here'
            raise UserError(f"'{folder}' is of another network than the run: {differs}")
        if is_classifier:
            hf.score(folder, network.config.emb_dim)  # one label
        return bases.load(BaseConfig(network, folder), partitioner, 0, classifier=is_classifier).params
    except UserError as error:
        raise UserError(f'export: --base: {error}') from error


def check_parts(folder: str) -> None:
    """Refuse weights of several parts: PEFT makes the whole model of them, whose layers have other names than a text's.

    Raises:
      UserError: naming the way to a folder of the text part.
    """
    kind = json.loads((hf.resolve(folder, weights=False) / 'config.json').read_text()).get('model_type')
    if kind in TEXT_OF:
        raise UserError(
            f"export: '{folder}' is of several parts (model_type {kind}), in which PEFT would put the adapter nowhere; "
            f'make a folder of the text part: `perl_jax import --format=hf --input={folder} --model_dir=DIR '
            '--gin_file=models/from_hf.gin`, `perl_jax export --model_dir=DIR --format=hf --output=FOLDER`, then pass '
            '--base=FOLDER'
        )


def cut(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """The nearest adapter of a rank, and how far it is off, as a share."""
    made, error = averaging.truncate(adapter, rank)
    return made, float(error)


def _joined(runs: list[str], adapter: Adapter) -> Adapter:
    """All runs' adapters, the last run's first, whose head and dropout it has."""
    adapters = [adapter]
    for run in runs[1:]:
        if _is_copy(run):
            continue
        phase = rundir.about(run)['phase']
        before, _ = finished.read_adapter(run, 'policy', phase=phase, flag='export')
        if before.lora is None:
            raise UserError(
                f"export: '{run}' was full tuning, which no adapter holds; export it with --format=hf --output=FOLDER, "
                'and then this run with --format=peft --base=FOLDER'
            )
        adapters.append(before)
    if len(adapters) == 1 or adapter.lora is None:  # the exporter says what full tuning is to be exported as
        return adapter
    made = averaging.concatenate([each.replace(head=None) for each in adapters], [1.0] * len(adapters))
    return made.replace(head=adapter.head, dropout=adapter.dropout)


def _base(run: str) -> dict[str, str]:
    return rundir.about(run)['base']


def _is_copy(run: str) -> bool:
    """Whether a MODEL_DIR was made by importing weights, and so is just these."""
    about = rundir.about(run)
    return about.get('imported') == about['base']['path'] and about['tuning'] == 'full'


def _how_to_make(weights: str, nearest: str | None) -> str:
    ask = 'then pass --base=FOLDER'
    format = 'gguf' if weights.endswith('.gguf') else 't5x' if t5x.find(weights) is not None else None
    if format is not None:
        return (
            f'make one: `perl_jax import --format={format} --input={weights} --model_dir=DIR --gin_file=MODEL.gin`, '
            f'`perl_jax export --model_dir=DIR --format=hf --output=FOLDER`, {ask}'
        )
    if nearest is not None:
        return f'export what this run started from: --model_dir={nearest} --format=hf --output=FOLDER, {ask}'
    return 'export the whole model with --format=hf'


def _alike(folder: str, ours: PyTree, theirs: PyTree, but: tuple[str, ...] = ()) -> bool:
    """Whether weights are the same but for how they were rounded, in the folder and when they were merged.

    Args:
      but: leaves that do not count.
    """
    said = json.loads((hf.resolve(folder, weights=False) / 'config.json').read_text())
    kind = said.get('dtype') or said.get('torch_dtype') or 'float32'
    dtypes = [kind if kind in ('bfloat16', 'float16') else 'float32', jax.tree.leaves(ours)[0].dtype]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)

    def close(ours: jax.Array, theirs: jax.Array) -> bool:
        x, y = (np.asarray(jax.device_get(z), np.float32) for z in (ours, theirs))
        room = 2 * eps * np.abs(x) + 1e-6 * np.abs(x).max()
        return bool((np.abs(x - y) <= room).all())

    ours, theirs = (trees.flatten(tree) for tree in (ours, theirs))
    return all(close(ours[leaf], theirs[leaf]) for leaf in ours if leaf not in but)
