"""Reads Google's Taskmaster files: rated answers (thumbs) and dialogs, with the split that keeps openings apart.

Files (CC BY 4.0), as github.com/google-research-datasets/Taskmaster lays them out; TASKMASTER_DIR names the clone:
    coffee      TM-4-2024/reward/*.json   TM-4-2024/data/*.json
    ticketing   TM-3-2020/reward/*.json   TM-3-2020/splits/train/train.tsv, or its parts train-aa.tsv .. train-bc.tsv

Source: Sidahmed et al., PERL: Parameter Efficient Reinforcement Learning from Human Feedback, arXiv 2403.10704.
"""

import csv
import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

from perl_jax import json_files
from perl_jax.errors import UserError
from perl_jax.tasks import dialog_text, splits
from perl_jax.tasks.sources import odd_rows
from perl_jax.tasks.sources.files import check_pointer

_REWARD = {'coffee': 'TM-4-2024/reward/*.json', 'ticketing': 'TM-3-2020/reward/*.json'}
_DIALOGS = {'coffee': 'TM-4-2024/data/*.json', 'ticketing': 'TM-3-2020/splits/train/train-*.tsv'}
_JOINED = 'TM-3-2020/splits/train/train.tsv'  # `cat train-*.tsv > train.tsv`, says its README
_NUM_FILES = dict(zip((*_REWARD.values(), *_DIALOGS.values()), (7, 8, 8, 29)))  # of each pattern, upstream
_TAGS = 'PN|PAN|PAV|PR|PRAN|PRAV|U|A|S'


@dataclasses.dataclass(frozen=True)
class Rated:
    """One rated answer: the context's lines, the answer's line, 1.0 for a thumb up and 0.0 for a thumb down.

    `opening` is the normalised first user utterance, or the conversation_id where no user speaks.
    """

    split: str
    opening: str
    context: tuple[str, ...]
    answer: str
    label: float


@dataclasses.dataclass(frozen=True)
class Dialog:
    """One dialog: its lines from the first turn on."""

    split: str
    conversation_id: str
    lines: tuple[str, ...]


def opening(user_text: str) -> str:
    """Normalises a first user utterance: lower case, every run outside [a-z0-9] one space, stripped."""
    return re.sub('[^a-z0-9]+', ' ', user_text.lower()).strip()


def split_of(domain: str, key: str) -> str:
    """The split of an opening, or of a conversation_id where no user speaks.

    All rows of a session share their opening and each has a conversation_id of its own, so splitting by id would leak.
    """
    return splits.by_group(domain, key)


def rated(domain: str) -> list[Rated]:
    """All rated answers of 'coffee' or 'ticketing' in the files' order. Raises UserError where they cannot be read."""
    return _rated(_folder(), domain)


def dialogs(domain: str) -> list[Dialog]:
    """All dialogs of 'coffee' or 'ticketing' in the files' order, each once. Raises UserError as `rated` does."""
    return _dialogs(_folder(), domain)


def _folder() -> pathlib.Path:
    folder = os.environ.get('TASKMASTER_DIR')
    if not folder:
        raise UserError(
            'TASKMASTER_DIR is not set: clone github.com/google-research-datasets/Taskmaster and set it to its folder'
        )
    return pathlib.Path(folder)


# The cache saves the second parse, and the second warning, when a task is read again: several epochs, several kinds.
@functools.lru_cache(maxsize=8)
def _rated(folder: pathlib.Path, domain: str) -> list[Rated]:
    return odd_rows.parse(_REWARD[domain], _json_rows(folder, _REWARD[domain]), functools.partial(_rated_row, domain))


@functools.lru_cache(maxsize=8)
def _dialogs(folder: pathlib.Path, domain: str) -> list[Dialog]:
    pattern = _DIALOGS[domain]
    if domain == 'coffee':
        parse = functools.partial(_json_dialog, domain)
        return odd_rows.parse(pattern, _json_rows(folder, pattern), parse, unique=_longest_by('lines'))
    if (folder / _JOINED).exists():
        pattern = _JOINED
    # Here a row is a dialog up to one turn of the agent: of two rows of a dialog, the longer holds the other.
    parse = functools.partial(_tsv_dialog, domain)
    return odd_rows.parse(pattern, _tsv_rows(folder, pattern), parse, unique=_longest_by('conversation_id'))


def _longest_by(field: str) -> Callable[[list[Dialog]], list[Dialog]]:
    """Of the dialogs with the same value of a field only the longest is kept, at the first one's place."""

    def unique(dialogs: list[Dialog]) -> list[Dialog]:
        rows_by_key = {}
        for dialog in dialogs:
            key = getattr(dialog, field)
            rows_by_key[key] = max(rows_by_key.get(key, dialog), dialog, key=lambda d: len(d.lines))
        return list(rows_by_key.values())

    return unique


def _files(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(
            f'TASKMASTER_DIR={folder} holds no {pattern}: set it to a clone of '
            'github.com/google-research-datasets/Taskmaster'
        )
    if len(files) < (num_files := _NUM_FILES.get(pattern, 0)):
        print(
            f'warning: TASKMASTER_DIR={folder} holds {len(files)} of the {num_files} files {pattern}; clone Taskmaster '
            'again for the others',
            file=sys.stderr,
        )
    return files


def _text(file: pathlib.Path) -> str:
    check_pointer(file)
    try:
        return file.read_bytes().decode('utf-8')
    except (OSError, ValueError) as error:
        raise UserError(f'{file} cannot be read as UTF-8 text ({error}): clone Taskmaster again') from None


def _json_rows(folder: pathlib.Path, pattern: str) -> Iterable[tuple[str, Any]]:
    for file in _files(folder, pattern):
        rows = json_files.parse_list(_text(file), file, 'clone Taskmaster again')
        for number, row in enumerate(rows, start=1):
            yield f'{file.name} row {number}', row


def _tsv_rows(folder: pathlib.Path, pattern: str) -> Iterable[tuple[str, Any]]:
    for file in _files(folder, pattern):
        for number, line in enumerate(_text(file).removesuffix('\n').split('\n'), start=1):
            # One line at a time: a stray quote must not swallow the rows that follow.
            yield f'{file.name} row {number}', next(csv.reader([line.rstrip('\r')], delimiter='\t'), [])


def _key(domain: str, turns: list[dict], conversation_id: str) -> tuple[str, str]:
    """-> the split and what it was made from: the opening, or the id where no user speaks."""
    first = next((turn['text'] for turn in turns if turn['role'] == 'user'), None)
    key = conversation_id if first is None else opening(first)
    return split_of(domain, key), key


def _rated_row(domain: str, row: dict) -> Rated:
    context, answer = json.loads(row['context']), json.loads(row['generation'])
    label = float(row['reward'])
    if label not in (0.0, 1.0):
        raise ValueError(f'reward is {label}, not 0 or 1')
    *lines, last = dialog_text.lines([*context, answer])
    if answer['role'] != 'agent':
        raise ValueError(f'generation is a turn of the {answer["role"]}, not of the agent')
    split, key = _key(domain, context, row['conversation_id'])
    return Rated(split, key, tuple(lines), last, label)


def _json_dialog(domain: str, row: dict) -> Dialog:
    turns = [turn for utterance in row['utterances'] for turn in _turns(utterance)]
    conversation_id = row['conversation_id']
    return Dialog(_key(domain, turns, conversation_id)[0], conversation_id, tuple(dialog_text.lines(turns)))


def _turns(utterance: dict) -> Iterable[dict]:
    """An utterance, then the calls and responses that it set off: annotations in the order in which they happened."""
    yield {'role': 'user' if utterance['speaker'] == 'user' else 'agent', 'text': utterance['text']}
    name, request = '', {}
    for annotation in utterance['annotations']:
        value = annotation['value']
        match annotation['name']:
            case 'api_call':
                request = {}  # show_menu comes without a request now and then
            case 'request':
                request = json.loads(value)
            case 'api_response':
                name = value
                yield {'role': 'agent', 'api': {name: request}}
            case 'response':
                response = json.loads(value)
                if isinstance(response, dict):  # the rated answers call the same list `items`
                    response = {'items' if k == 'menu_items' else k: v for k, v in response.items()}
                yield {'role': 'api', 'response': {name: response}}


def _tsv_dialog(domain: str, row: list[str]) -> Dialog:
    """context<TAB>target<TAB>id, where the context is its last turn, `<C>`, and all that came before."""
    if len(row) != 3:
        raise ValueError(f'it has {len(row)} columns, not 3')
    last, _, history = row[0].partition('<C>')
    context = _tagged(history + last, f'<({_TAGS})>')
    answer = _tagged(row[1], rf'\[({_TAGS})\]')
    if not answer or any(turn['role'] != 'agent' for turn in answer):
        raise ValueError('the target is not a turn of the agent')
    return Dialog(_key(domain, context, row[2])[0], row[2], tuple(dialog_text.lines(context + answer)))


def _tagged(text: str, tag: str) -> list[dict]:
    """<U>.. <A>.. <PN>call <PAN>argument <PAV>value <PR>response <PRAN>key <PRAV>value <PRAV>value -> turns."""
    before, *pieces = re.split(tag, text)
    if before:
        raise ValueError(f'text before the first tag: {before[:40]}')
    turns, fields, values = [], {}, []
    for name, content in zip(pieces[::2], pieces[1::2]):
        match name:
            case 'U' | 'A':
                turns.append({'role': 'user' if name == 'U' else 'agent', 'text': content})
            case 'PN':
                turns.append({'role': 'agent', 'api': {content: (fields := {})}})
            case 'PR':
                turns.append({'role': 'api', 'response': {content: (fields := {})}})
            case 'PAN' | 'PRAN':
                values = fields.setdefault(content, [])
            case 'PAV' | 'PRAV':
                values.append(content)
    return turns
