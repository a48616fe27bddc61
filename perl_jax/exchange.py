"""`perl_jax export` and `perl_jax import`: what a run learned, out to other libraries, and what they have, in.

    export --format=hf     merged weights, that transformers loads; a reward's with its head, as a classifier
    export --format=peft   the adapter alone, that peft loads onto the model it was trained on
    export --format=t5x    merged weights, that T5X restores (encoder-decoder networks)
    import --format=...    the way back, into a MODEL_DIR to start from: INITIAL_CHECKPOINT_PATH, or REWARD_MODEL_DIR
"""

from __future__ import annotations

import dataclasses
import logging

import jax

from perl_jax import base as bases
from perl_jax import lora, partitioning, rundir, runs, vocabulary
from perl_jax.base import BaseConfig
from perl_jax.errors import UserError
from perl_jax.interop import hf, peft, t5x
from perl_jax.networks.t5 import T5
from perl_jax.partitioning import Partitioner


def export_run(
    model_dir: str,
    format: str,
    output: str,
    base: BaseConfig,
    dtype: str = 'float32',
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Write the best checkpoint of a run to the folder `output`, which must not be there yet.

    `dtype` is that of merged weights; adapters are float32.

    Raises:
      UserError: a folder that is there, or a network or adapter that has no such form.
    """
    phase = rundir.read(model_dir)['phase']
    role = 'reward' if phase == 'reward' else 'policy'
    network = base.network
    if format == 't5x' and (not isinstance(network, T5) or role == 'reward'):
        raise UserError('export: T5X restores encoder-decoder policies alone; choose --format=hf or --format=peft')
    with partitioner.scope(), rundir.whole(output) as folder:
        adapter, about = bases.read_adapter(model_dir, role, phase=phase, flag='--model_dir')
        path = about['base']['path']
        if format == 'peft':
            peft.save(folder, network, adapter, path.removeprefix(hf.HUB))
            if not hf.is_checkpoint(path):
                logging.getLogger('perl_jax').warning(
                    f"the adapter fits the weights of '{path}', which are not in Hugging Face's form; "
                    'export those with --format=hf and name that folder in base_model_name_or_path'
                )
        else:
            params = lora.merge(bases.named(network, about['base'], partitioner, base.path).params, adapter)
            if format == 't5x':
                t5x.save(folder, params, 0)
            else:
                head = None if adapter.head is None else adapter.head['kernel']
                hf.save(folder, network, params, dtype, head, path if hf.is_checkpoint(path) else None)
    print(output)


def import_run(
    model_dir: str,
    format: str,
    input: str,
    base: BaseConfig,
    config_text: str = '',
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Make a MODEL_DIR, as an SFT or a reward run leaves it, of somebody else's weights or adapter.

    Args:
      base: the network; and for an adapter the weights that it is for (None is what adapter_config.json names).

    Raises:
      UserError: a MODEL_DIR that is there, or an input that cannot be read.
    """
    if format == 'peft':
        base = dataclasses.replace(base, path=base.path or peft.base_of(input))
    else:
        base = dataclasses.replace(base, path=input)
        found = 'gguf' if input.endswith('.gguf') else 'hf' if hf.is_checkpoint(input) else None
        found = found or ('t5x' if t5x.find(input) else format)
        if found != format:
            raise UserError(f"import: --format={format}: '{input}' is a checkpoint of {found}")
    with partitioner.scope(), rundir.whole(model_dir) as folder:
        frozen = bases.load(base, partitioner, 0)
        if format == 'peft':
            shapes, _ = partitioning.abstract(base.network)
            adapter = peft.load(input, base.network, shapes, frozen.params)
        else:
            adapter = lora.FullSpec().init(jax.random.key(0), frozen.params)
        words = None if format == 't5x' else vocabulary.of_base(base.path)  # T5X's checkpoints bring no tokenizer
        role, phase = ('policy', 'sft') if adapter.head is None else ('reward', 'reward')
        name, size = words and words.name, lora.count(frozen.params)
        runs.made(folder, phase, role, adapter, frozen.name, size, name, input, config_text)
    print(model_dir)
