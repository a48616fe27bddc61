"""`perl_jax export` and `perl_jax import`: exchange of weights and adapters with other libraries.

    export --format=hf     merged weights for transformers; a reward becomes a classifier
    export --format=peft   the adapter alone, for peft; it applies to the original weights (or --base), and a README.md
                           shows how to load it
    export --format=t5x    merged weights for T5X (encoder-decoder networks)
    import --format=...    the reverse: makes a MODEL_DIR for INITIAL_CHECKPOINT_PATH or REWARD_MODEL_DIR
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib

import jax

from perl_jax.data import lexicon, vocabulary
from perl_jax.errors import UserError
from perl_jax.interop import hf, peft, peft_config, t5x
from perl_jax.interop.t5x_network import T5XNetwork
from perl_jax.models import lora
from perl_jax.models.t5 import T5
from perl_jax.parallel import partitioning
from perl_jax.parallel.partitioning import Partitioner
from perl_jax.runs import base as bases
from perl_jax.runs import finished, lineage, rebase, rundir
from perl_jax.runs.base import BaseConfig
from perl_jax.tools import companions, peft_card
from perl_jax.train import loop


def export_run(
    model_dir: str,
    format: str,
    output: str,
    base: BaseConfig,
    *,
    dtype: str = 'float32',
    onto: str | None = None,
    rank: int | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Write the best checkpoint of a run to the new folder `output`.

    Args:
      model_dir: the MODEL_DIR of the run.
      format: 'hf', 'peft' or 't5x'.
      output: the folder to write, which must not exist.
      base: the base of the run.
      dtype: the dtype of merged weights; adapters are float32.
      onto: for 'peft', the weights that the adapter applies to: a Hugging Face folder or hf://OWNER/NAME. None is the
        original weights of the first run; the adapters of all runs since are then combined into one.
      rank: for 'peft', truncate the adapter to this rank.
      partitioner: the devices.

    Raises:
      UserError: `output` exists, or the network or adapter cannot be written in this format.
    """
    phase = rundir.require(model_dir)['phase']
    role = 'reward' if phase == 'reward' else 'policy'
    network = base.network
    if format != 't5x' and isinstance(network, T5XNetwork):
        raise UserError("export: only T5X can load T5X's own network; choose --format=t5x")
    if format == 't5x' and (not isinstance(network, T5 | T5XNetwork) or role == 'reward'):
        raise UserError(
            'export: --format=t5x is for encoder-decoder policies only; choose --format=hf or --format=peft'
        )
    for name, flag_value in ('base', onto), ('rank', rank):
        if flag_value is not None and format != 'peft':
            raise UserError(f'export: --{name} requires --format=peft')
    with partitioner.scope(), rundir.complete_folder(output) as folder:
        adapter, about = finished.read_adapter(model_dir, role, phase=phase, flag='--model_dir')
        model_files = _companions(model_dir, role)
        if format == 'peft':
            adapter, weights = _adapter_for_peft_base(model_dir, adapter, onto, rank, base, partitioner)
            name = weights.removeprefix(hf.HUB)
            task = peft.save(folder, network, adapter, name)
            load_arguments = peft_card.required_arguments(weights, task, model_files)
            peft_card.write(folder, name, task, model_files, load_arguments)
            if load_arguments:
                load_call = peft_card.load_call(task, repr(output), load_arguments)
                logging.getLogger('perl_jax').warning(
                    f'export: load it with {load_call}; its {peft_card.FILE} says why'
                )
        else:
            params = lora.merge(bases.load_recorded(network, about['base'], partitioner, base.path).params, adapter)
            if format == 't5x':
                t5x.save(folder, params, 0)
            else:
                head = None if adapter.head is None else adapter.head['kernel']
                hf.save(folder, network, params, dtype, head)
                model_files.write(pathlib.Path(folder))
    print(output)


def _adapter_for_peft_base(
    model_dir: str,
    adapter: lora.Adapter,
    onto: str | None,
    rank: int | None,
    base: BaseConfig,
    partitioner: Partitioner,
) -> tuple[lora.Adapter, str]:
    """Return the adapter rebased onto weights that PEFT can load, and their absolute path or hf://OWNER/NAME."""
    if adapter.lora is None:
        raise UserError('export: a fully tuned model has no LoRA adapter; export it with --format=hf')
    if onto is None:
        adapter, onto = rebase.for_origin(model_dir, adapter)
    else:
        if not hf.is_checkpoint(onto):
            raise UserError(f"export: --base: '{onto}' is no Hugging Face folder (config.json) and no hf://OWNER/NAME")
        adapter = rebase.onto(model_dir, adapter, onto, base.network, partitioner, base.path)
    rebase.check_is_text_model(onto)
    if rank is not None:
        adapter, error = rebase.truncate(adapter, rank)
        logging.getLogger('perl_jax').info(f'export: rank {rank} is {error:.1%} off the exact adapter')
    return adapter, onto if onto.startswith(hf.HUB) else os.path.abspath(os.path.expanduser(onto))


def _companions(model_dir: str, role: str) -> companions.Companions:
    """Collect the model's tokenizer and settings, with the EOS tokens of the run's sampling."""
    try:
        run_vocabulary = vocabulary.of_base(model_dir)
    except UserError as error:
        logging.getLogger('perl_jax').warning(f'export: written without a tokenizer: {error}')
        run_vocabulary = None
    tokenizer_path = run_vocabulary and run_vocabulary.name.partition(lexicon.EOS)[0]
    eos_ids = () if run_vocabulary is None else lexicon.eos_ids(run_vocabulary.vocabulary)
    model_files = companions.collect(lineage.origin(model_dir), tokenizer_path, eos_ids)
    return companions.for_rewards(model_files, eos_ids) if role == 'reward' else model_files


def import_run(
    model_dir: str,
    format: str,
    input: str,
    base: BaseConfig,
    config_text: str = '',
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Make a MODEL_DIR, as of a finished SFT or reward run, from another library's weights or adapter.

    Args:
      model_dir: the MODEL_DIR to make, which must not exist.
      format: 'hf', 'gguf', 'peft' or 't5x'.
      input: the weights or adapter.
      base: the network; for an adapter also the weights that it applies to (None: those that adapter_config.json
        names).
      config_text: the contents of the new run's config.gin.
      partitioner: the devices.

    Raises:
      UserError: `model_dir` exists, or the input cannot be read.
    """
    if not input:
        raise UserError("import: --input = '': give the folder of a checkpoint or an adapter")
    if format == 'peft':
        base = dataclasses.replace(base, path=base.path or peft.base_of(input))
    else:
        base = dataclasses.replace(base, path=input)
        detected_format = 'gguf' if input.endswith('.gguf') else 'hf' if hf.is_checkpoint(input) else None
        detected_format = detected_format or ('t5x' if t5x.find(input) else format)
        if detected_format != format:
            raise UserError(f"import: --format={format}: '{input}' is a checkpoint of {detected_format}")
    with partitioner.scope(), rundir.complete_folder(model_dir) as folder:
        is_reward = format == 'hf' and hf.is_classifier(input)
        head = hf.score(input, base.network.config.emb_dim) if is_reward else None
        is_reward |= format == 'peft' and peft_config.read(pathlib.Path(input)).task == 'SEQ_CLS'
        frozen_base = bases.load(base, partitioner, 0, classifier=is_reward)
        if format == 'peft':
            shapes, _ = partitioning.abstract_params(base.network)
            adapter = peft.load(input, base.network, shapes, frozen_base.params)
        else:
            adapter = lora.FullSpec().init(jax.random.key(0), frozen_base.params)
            adapter = adapter.replace(head=None if head is None else {'kernel': head})
        assert base.path is not None  # --input, which is not empty
        # T5X's checkpoints have no tokenizer.
        input_vocabulary = None if format == 't5x' else vocabulary.of_base(base.path)
        role, phase = ('policy', 'sft') if adapter.head is None else ('reward', 'reward')
        about = {
            'base': frozen_base.name,
            'base_parameters': lora.count(frozen_base.params),
            'vocabulary': {} if input_vocabulary is None else input_vocabulary.run_fields,
            'source': input,
        }
        loop.write_finished_run(folder, phase, role, adapter, **about, config_text=config_text)
    print(model_dir)
