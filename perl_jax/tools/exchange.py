"""`perl_jax export` and `perl_jax import`: what a run learned, out to other libraries, and what they have, in.

    export --format=hf     merged weights, that transformers loads; a reward's with its head, as a classifier
    export --format=peft   the adapter alone, that peft loads onto the weights behind all runs (or --base), as README.md
                           there says
    export --format=t5x    merged weights, that T5X restores (encoder-decoder networks)
    import --format=...    the way back, into a MODEL_DIR to start from: INITIAL_CHECKPOINT_PATH, or REWARD_MODEL_DIR
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib

import jax

from perl_jax.data import lexicon, vocabulary
from perl_jax.errors import UserError, check_count
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
    dtype: str = 'float32',
    onto: str | None = None,
    rank: int | None = None,
    partitioner: Partitioner = Partitioner(),  # noqa: B008 (frozen)
) -> None:
    """Write the best checkpoint of a run to the folder `output`, which must not be there yet.

    Args:
      dtype: of merged weights; adapters are float32.
      onto: of --format=peft: a Hugging Face folder or hf://OWNER/NAME of weights that the adapter is to be for; None
        are those behind all runs, with all adapters since then as one.
      rank: of --format=peft: cut that adapter to the nearest of this rank.

    Raises:
      UserError: a folder that is there, or a network or adapter that has no such form.
    """
    phase = rundir.about(model_dir)['phase']
    role = 'reward' if phase == 'reward' else 'policy'
    network = base.network
    if format != 't5x' and isinstance(network, T5XNetwork):
        raise UserError("export: T5X's own network is known to T5X alone; choose --format=t5x")
    if format == 't5x' and (not isinstance(network, T5 | T5XNetwork) or role == 'reward'):
        raise UserError('export: T5X restores encoder-decoder policies alone; choose --format=hf or --format=peft')
    for name, value in ('base', onto), ('rank', rank):
        if value is not None and format != 'peft':
            raise UserError(f'export: --{name} goes with --format=peft alone')
    if rank is not None:
        check_count('export: --rank', rank)
    with partitioner.scope(), rundir.whole(output) as folder:
        adapter, about = finished.read_adapter(model_dir, role, phase=phase, flag='--model_dir')
        beside = _companions(model_dir, role)
        if format == 'peft':
            adapter, weights = _on_their_base(model_dir, adapter, onto, rank, base, partitioner)
            name = weights.removeprefix(hf.HUB)
            task = peft.save(folder, network, adapter, name)
            needed = peft_card.arguments(weights, task, beside)
            peft_card.write(folder, name, task, beside, needed)
            if needed:
                line = peft_card.call(task, repr(output), needed)
                logging.getLogger('perl_jax').warning(f'export: load it with {line}; its {peft_card.FILE} says why')
        else:
            params = lora.merge(bases.named(network, about['base'], partitioner, base.path).params, adapter)
            if format == 't5x':
                t5x.save(folder, params, 0)
            else:
                head = None if adapter.head is None else adapter.head['kernel']
                hf.save(folder, network, params, dtype, head)
                beside.write(pathlib.Path(folder))
    print(output)


def _on_their_base(
    model_dir: str,
    adapter: lora.Adapter,
    onto: str | None,
    rank: int | None,
    base: BaseConfig,
    partitioner: Partitioner,
) -> tuple[lora.Adapter, str]:
    """The adapter for weights that PEFT can load, and where these are: a whole path, or hf://OWNER/NAME."""
    if adapter.lora is None:
        raise UserError('export: a fully tuned model is no LoRA adapter; export it with --format=hf')
    if onto is None:
        adapter, onto = rebase.for_origin(model_dir, adapter)
    else:
        if not hf.is_checkpoint(onto):
            raise UserError(f"export: --base: '{onto}' is no Hugging Face folder (config.json) and no hf://OWNER/NAME")
        adapter = rebase.onto(model_dir, adapter, onto, base.network, partitioner, base.path)
    rebase.check_parts(onto)
    if rank is not None:
        adapter, error = rebase.cut(adapter, rank)
        logging.getLogger('perl_jax').info(f'export: rank {rank} is {error:.1%} off the exact adapter')
    return adapter, onto if onto.startswith(hf.HUB) else os.path.abspath(os.path.expanduser(onto))


def _companions(model_dir: str, role: str) -> companions.Companions:
    """What the model was published with, and where its answers end as the run samples them."""
    try:
        words = vocabulary.of_base(model_dir)
    except UserError as error:
        logging.getLogger('perl_jax').warning(f'export: no tokenizer goes along: {error}')
        words = None
    path = words and words.name.partition(lexicon.EOS)[0]
    ends = () if words is None else lexicon.eos_ids(words.vocabulary)
    given = companions.collect(lineage.origin(model_dir), path, ends)
    return companions.for_rewards(given, ends) if role == 'reward' else given


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
    if not input:
        raise UserError("import: --input = '': name the folder of a checkpoint or an adapter")
    if format == 'peft':
        base = dataclasses.replace(base, path=base.path or peft.base_of(input))
    else:
        base = dataclasses.replace(base, path=input)
        found = 'gguf' if input.endswith('.gguf') else 'hf' if hf.is_checkpoint(input) else None
        found = found or ('t5x' if t5x.find(input) else format)
        if found != format:
            raise UserError(f"import: --format={format}: '{input}' is a checkpoint of {found}")
    with partitioner.scope(), rundir.whole(model_dir) as folder:
        is_reward = format == 'hf' and hf.is_classifier(input)
        head = hf.score(input, base.network.config.emb_dim) if is_reward else None
        is_reward |= format == 'peft' and peft_config.read(pathlib.Path(input)).task == 'SEQ_CLS'
        frozen = bases.load(base, partitioner, 0, classifier=is_reward)
        if format == 'peft':
            shapes, _ = partitioning.abstract(base.network)
            adapter = peft.load(input, base.network, shapes, frozen.params)
        else:
            adapter = lora.FullSpec().init(jax.random.key(0), frozen.params)
            adapter = adapter.replace(head=None if head is None else {'kernel': head})
        assert base.path is not None  # it is what is imported
        words = None if format == 't5x' else vocabulary.of_base(base.path)  # T5X's checkpoints bring no tokenizer
        role, phase = ('policy', 'sft') if adapter.head is None else ('reward', 'reward')
        named, size = {} if words is None else words.about, lora.count(frozen.params)
        about = {'base': frozen.name, 'base_parameters': size, 'vocabulary': named, 'source': input}
        loop.made(folder, phase, role, adapter, **about, config_text=config_text)
    print(model_dir)
