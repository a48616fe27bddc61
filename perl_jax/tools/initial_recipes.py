"""`perl_jax init`: recipes for a model and a user's rows, with lengths and steps that follow from both."""

from __future__ import annotations

import os
import pathlib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perl_jax.data import lexicon, providers
from perl_jax.data.user_code import task_errors
from perl_jax.errors import UserError
from perl_jax.runs import lineage
from perl_jax.tasks.user_files import recognition, schemas, task
from perl_jax.tasks.user_files.form import Form, Kind
from perl_jax.tokenizers import vocabularies
from perl_jax.tokenizers.chat import template
from perl_jax.tools import inspect_task

PERCENTILE = 99  # of the rows that fit into the lengths
MULTIPLE = 16  # of which lengths are
EPOCHS = {'sft': 3, 'reward': 2}
BATCH_SIZES = {'sft': 32, 'reward': 32, 'policy': 16}
POLICY_STEPS = 200

_HEADER = """\
# {title} of {model}
# on {paths}: {schema}, {rows:,} rows of train.
# Written by `perl_jax init`; every setting may be edited. Run:
#   perl_jax {phase} --gin_file={file}
include 'models/from_hf.gin'
include 'runs/{phase}.gin'
include 'data/files.gin'

MODEL_DIR = {model_dir!r}
"""
_ROWS = """
PATHS = {paths!r}
KIND = {kind!r}
COLUMNS = {columns!r}
CHAT = {chat!r}  # {chat_reason}
"""
_LENGTHS = "TASK_FEATURE_LENGTHS = {lengths!r}  # tokens; {reason}\n"
_NO_HELDOUT = 'EVAL_DATASET = None  # no row fell into validation: name the files of each split, or add rows\n'
_POLICY = 'MAX_DECODE_LENGTH = {}\nNUM_SAMPLES = 4  # answers of each prompt\n'
_SAMPLING = {  # by phase, and whether there are rows of validation
    ('sft', True): 'PROMPTS_DATASET = @prompts/data.DatasetConfig()  # answers at each evaluation\n'
    'sampling.SamplingConfig.max_decode_length = {}\n',
    ('reward', True): '',
    ('policy', True): _POLICY,
    ('sft', False): _NO_HELDOUT,
    ('reward', False): _NO_HELDOUT,
    ('policy', False): _NO_HELDOUT + _POLICY,
}
_TITLES = {'sft': 'Supervised fine-tuning', 'reward': 'A reward', 'policy': 'A policy by REINFORCE'}


def write(folder: str, model: str, paths: str | Sequence[str], columns: Mapping[str, str]) -> str:
    """Write sft.gin, and where the rows can train a reward reward.gin and policy.gin.

    Args:
      folder: where to write; runs go to its folders sft, reward and policy.
      model: a Hugging Face folder, hf://OWNER/NAME or a .gguf.
      paths, columns: as in `task.task`.

    Returns:
      What was recognised and written, and the next command, for the terminal.

    Raises:
      UserError: rows without answers, a model without a tokenizer or of an unknown family, or files that exist.
    """
    tokenizer = vocabularies.of_base(model)
    if tokenizer is None:
        raise UserError(f"--model: '{model}' has no tokenizer; give a Hugging Face folder, hf://OWNER/NAME or a .gguf")
    lineage.network(model)  # refuses a family that is not known, before anything is read
    summary = recognition.summarise(task.to_place(paths), Form('prompts', task.to_columns(columns)))
    kind = typing.cast(Kind, summary.schema.kind)
    if 'sft' not in schemas.USES[kind]:
        raise UserError(f'--data: the rows are {summary.schema.name}; training needs answers: {schemas.known_forms()}')
    name = task.task(paths, kind, columns=columns, model=model)
    lengths, has_heldout = _lengths(name, tokenizer), bool(providers.find(name).num_input_examples('validation'))
    phases = [recognition.PHASES[use] for use in ('sft', kind, 'prompts')] if kind != 'sft' else ['sft']
    texts = {pathlib.Path(folder, f'{phase}.gin'): '' for phase in phases}
    if existing := [str(path) for path in texts if path.exists()]:
        raise UserError(f'init: {", ".join(existing)} exist already; name another folder')
    chat = 'own' if template.exists(model) else 'plain'
    settings = {
        'model': model, 'paths': paths, 'columns': dict(columns) or None, 'schema': summary.schema.name, 'chat': chat,
        'chat_reason': "the model's own template" if chat == 'own' else 'the model has no chat template: plain text',
        'rows': len(lengths['inputs']), 'has_heldout': has_heldout,
    }  # fmt: skip
    for phase, path in zip(phases, texts, strict=True):
        texts[path] = _recipe(phase, folder, kind, lengths, settings)
    os.makedirs(folder, exist_ok=True)
    for path, text in texts.items():
        with path.open('x') as file:
            file.write(text)
    first, *_ = texts
    return '\n'.join([
        *recognition.lines(summary), f'wrote {", ".join(map(str, texts))}', f'next: perl_jax sft --gin_file={first}',
    ])  # fmt: skip


def _lengths(name: str, tokenizer: str) -> dict[str, np.ndarray]:
    """Returns the tokens of each text in train, [n] of each feature, BOS and EOS included."""
    provider = lexicon.with_continuing_responses(
        lexicon.with_vocabulary(providers.find(name), lexicon.from_name(tokenizer))
    )
    features = [name for name, feature in provider.output_features.items() if feature.rank == 1]
    rows: Any = providers.rows(provider, 'train', dict.fromkeys(features, inspect_task.MAX_LENGTH))
    counts = [[len(row[name]) for name in features] for row in task_errors.read(rows, name, 'train')]
    if not counts:
        raise UserError('--data: no rows of train; name the files of each split train.., validation..')
    lengths = dict(zip(features, np.array(counts).T, strict=True))
    has_bos = lexicon.bos_id(provider.output_features['inputs'].vocabulary) is not None
    return lengths | {'inputs': lengths['inputs'] + has_bos}


def _recipe(
    phase: str, folder: str, kind: Kind, lengths: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> str:
    path, model_dir = (os.path.join(folder, name) for name in (f'{phase}.gin', phase))
    rows_kind = {'sft': 'sft', 'reward': kind, 'policy': 'prompts'}[phase]
    text = _HEADER.format(title=_TITLES[phase], phase=phase, file=path, model_dir=model_dir, **settings)
    sft_dir, reward_dir = (os.path.join(folder, name) for name in ('sft', 'reward'))
    base_path = settings['model'] if phase == 'sft' else sft_dir
    text += f'INITIAL_CHECKPOINT_PATH = {base_path!r}\n'
    if phase == 'policy':
        text += f'REWARD_MODEL_DIR = {reward_dir!r}\n'
    text += _ROWS.format(kind=rows_kind, **settings)
    answers = np.concatenate([lengths[name] for name in lengths if name != 'inputs'])
    prompt, answer = (_fitting(x) for x in (lengths['inputs'], answers))
    widths = {'inputs': prompt} if phase == 'policy' else {'inputs': prompt, 'targets': answer}
    reason = f'{PERCENTILE}% of the prompts have at most {_percentile(lengths["inputs"])}'
    reason += f', of the answers {_percentile(answers)}' if phase != 'policy' else ''
    text += f'\n{_LENGTHS.format(lengths=widths, reason=reason)}'
    text += _SAMPLING[phase, settings['has_heldout']].format(answer)
    return text + _steps(phase, settings['rows'])


def _steps(phase: str, rows: int) -> str:
    batch_size = min(BATCH_SIZES[phase], 2 ** max(0, (rows // 8).bit_length() - 1))  # powers of two divide over chips
    steps = POLICY_STEPS if phase == 'policy' else max(10, EPOCHS[phase] * rows // batch_size)
    reason = f'  # each row {steps * batch_size / rows:.2g} times'
    return f'BATCH_SIZE = {batch_size}\nTRAIN_STEPS = {steps}{reason}\nEVAL_PERIOD = {max(1, steps // 5)}\n'


def _percentile(lengths: np.ndarray) -> int:
    return int(np.ceil(np.percentile(lengths, PERCENTILE)))


def _fitting(lengths: np.ndarray) -> int:
    return -(-_percentile(lengths) // MULTIPLE) * MULTIPLE
