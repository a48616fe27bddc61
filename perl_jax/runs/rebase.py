"""Combine the adapters of a run and of the runs before it into one adapter for weights that other programs load.

    origin -- SFT's adapter --> base of the policy -- the policy's adapter      W + s1 A1 B1 + s2 A2 B2
    origin -- [A1 A2], [s1 B1; s2 B2] -------------------------------------->   the same, exactly
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from perl_jax import json_files, trees
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
    """Returns the adapter from the original weights to what this run computes; and those weights.

    Raises:
      UserError: an earlier run was full tuning, or the original weights are not a Hugging Face checkpoint.
    """
    *runs, weights = lineage.chain(model_dir)
    if not hf.is_checkpoint(weights):
        nearest = next((run for run in runs[1:] if not _is_copy(run)), None)
        raise UserError(f"export: '{weights}' is no Hugging Face checkpoint; {_how_to_make(weights, nearest)}")
    return _concatenated(runs, adapter), weights


def onto(
    model_dir: str, adapter: Adapter, folder: str, network: nn.Module, partitioner: Partitioner, base_path: str | None
) -> Adapter:
    """Returns the adapter from the weights in `folder` to what this run computes.

    The folder may hold the run's own base or any base before it. For a reward it may also be a classifier with one
    label, whose head is replaced by the reward's.

    Args:
      model_dir: of the run.
      adapter: of the run.
      folder: a Hugging Face folder.
      network: of the run.
      partitioner: the devices, and how arrays are split over them.
      base_path: where the run's base is, if it was moved.

    Raises:
      UserError: it holds other weights than all of these, or those of another network.
    """
    *runs, _ = lineage.chain(model_dir)
    is_classifier = adapter.head is not None and hf.is_classifier(folder)
    folder_params = _load_folder(folder, network, partitioner, is_classifier)
    for i, run in enumerate(runs):
        run_params = bases.load_recorded(network, _base_record(run), partitioner, base_path if i == 0 else None).params
        if _are_same_weights(folder, run_params, folder_params, ignored_leaves=(_OUTPUT,) if is_classifier else ()):
            return _concatenated(runs[: i + 1], adapter)
    message = f"export: --base: '{folder}' does not hold the weights that '{model_dir}' was trained on, "
    message += f"'{_base_record(model_dir)['path']}'"
    if is_classifier:
        raise UserError(f'{message}; a reward that was exported with --format=hf has its adapter in it already')
    raise UserError(f'{message}; export those with --format=hf')


def _load_folder(folder: str, network: nn.Module, partitioner: Partitioner, is_classifier: bool) -> PyTree:
    """Returns the parameters in a folder that --base names; errors are reported as errors of --base."""
    try:
        folder_network, run_network = describe(hf.network(folder)), describe(network)
        if key := difference(folder_network, run_network):
            difference_text = f'{key} is {folder_network[key]!r} there and {run_network[key]!r} here'
            raise UserError(f"'{folder}' is of another network than the run: {difference_text}")
        if is_classifier:
            hf.score(folder, network.config.emb_dim)  # one label
        return bases.load(BaseConfig(network, folder), partitioner, 0, classifier=is_classifier).params
    except UserError as error:
        raise UserError(f'export: --base: {error}') from error


def check_is_text_model(folder: str) -> None:
    """Refuse weights of several parts: PEFT loads the whole model, whose layers have other names than a text model.

    Raises:
      UserError: with the commands that make a folder of the text part.
    """
    kind = json_files.read(hf.resolve(folder, weights=False) / 'config.json').get('model_type')
    if kind in TEXT_OF:
        raise UserError(
            f"export: '{folder}' is of several parts (model_type {kind}), in which PEFT would put the adapter nowhere; "
            f'make a folder of the text part: `perl_jax import --format=hf --input={folder} --model_dir=DIR '
            '--gin_file=models/from_hf.gin`, `perl_jax export --model_dir=DIR --format=hf --output=FOLDER`, then pass '
            '--base=FOLDER'
        )


def truncate(adapter: Adapter, rank: int) -> tuple[Adapter, float]:
    """Returns the nearest adapter of a rank, and its relative error."""
    truncated, error = averaging.truncate(adapter, rank)
    return truncated, float(error)


def _concatenated(runs: list[str], adapter: Adapter) -> Adapter:
    """Returns all runs' adapters combined, with the head and dropout of `adapter`, the last run's."""
    adapters = [adapter]
    for run in runs[1:]:
        if _is_copy(run):
            continue
        phase = rundir.require(run)['phase']
        earlier, _ = finished.read_adapter(run, 'policy', phase=phase, flag='export')
        if earlier.lora is None:
            raise UserError(
                f"export: '{run}' was full tuning, which no adapter holds; export it with --format=hf --output=FOLDER, "
                'and then this run with --format=peft --base=FOLDER'
            )
        adapters.append(earlier)
    if len(adapters) == 1 or adapter.lora is None:  # the exporter reports how to export full tuning
        return adapter
    combined = averaging.concatenate([item.replace(head=None) for item in adapters], [1.0] * len(adapters))
    return combined.replace(head=adapter.head, dropout=adapter.dropout)


def _base_record(run: str) -> dict[str, str]:
    return rundir.require(run)['base']


def _is_copy(run: str) -> bool:
    """Returns whether a MODEL_DIR was made by importing weights, and so is equal to them."""
    about = rundir.require(run)
    return about.get('imported') == about['base']['path'] and about['tuning'] == 'full'


def _how_to_make(weights: str, nearest_run: str | None) -> str:
    last_step = 'then pass --base=FOLDER'
    format = 'gguf' if weights.endswith('.gguf') else 't5x' if t5x.find(weights) is not None else None
    if format is not None:
        return (
            f'make one: `perl_jax import --format={format} --input={weights} --model_dir=DIR --gin_file=MODEL.gin`, '
            f'`perl_jax export --model_dir=DIR --format=hf --output=FOLDER`, {last_step}'
        )
    if nearest_run is not None:
        return f'export what this run started from: --model_dir={nearest_run} --format=hf --output=FOLDER, {last_step}'
    return 'export the whole model with --format=hf'


def _are_same_weights(
    folder: str, run_params: PyTree, folder_params: PyTree, ignored_leaves: tuple[str, ...] = ()
) -> bool:
    """Returns whether weights are equal up to rounding, in the folder's dtype and in the dtype of the merge.

    Args:
      folder: of the weights, whose config.json names the dtype.
      run_params: a run's base.
      folder_params: the weights in the folder.
      ignored_leaves: leaves that are not compared.
    """
    config = json_files.read(hf.resolve(folder, weights=False) / 'config.json')
    dtype_name = config.get('dtype') or config.get('torch_dtype') or 'float32'
    dtypes = [dtype_name if dtype_name in ('bfloat16', 'float16') else 'float32', jax.tree.leaves(run_params)[0].dtype]
    eps = max(float(jnp.finfo(dtype).eps) for dtype in dtypes)

    def are_close(run_params: jax.Array, folder_params: jax.Array) -> bool:
        x, y = (np.asarray(jax.device_get(z), np.float32) for z in (run_params, folder_params))
        tolerance = 2 * eps * np.abs(x) + 1e-6 * np.abs(x).max()
        return bool((np.abs(x - y) <= tolerance).all())

    run_params, folder_params = (trees.flatten(tree) for tree in (run_params, folder_params))
    return all(are_close(run_params[leaf], folder_params[leaf]) for leaf in run_params if leaf not in ignored_leaves)
