"""Flags of data and weights: T5X's two for SeqIO, and `--data` and `--model` for a user's own, which gin files read."""

from __future__ import annotations

import os
from typing import Any

from perl_jax.cli.parser import Parser
from perl_jax.errors import UserError
from perl_jax.parallel.stderr import silenced

NAMES = '--data', '--columns', '--model', '--seqio_additional_cache_dirs', '--tfds_data_dir'
KINDS = {'sft': 'sft', 'reward': 'reward', 'policy': 'prompts'}  # of the rows that a phase reads
DATA = 'rows: a file, folder or pattern, hf:OWNER/NAME or tfds:NAME; several, comma-separated'
COLUMNS = "what the rows' columns mean, where it is not recognised: prompt=question,chosen=good,rejected=bad"
MODEL = 'weights: a Hugging Face folder, hf://OWNER/NAME or a .gguf'


def parse_rows(command: str, argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Parse `--data` and `--model` of a phase.

    Returns:
      The gin files and bindings that they stand for, and the remaining arguments.
    """
    parser = Parser(prog=f'perl_jax {command}', add_help=False)
    parser.add_argument('--data', help=DATA)
    parser.add_argument('--columns', help=COLUMNS)
    parser.add_argument('--model', help=f'{MODEL}, or the MODEL_DIR of an SFT run')
    args, remaining = parser.parse_known_args(argv)
    files, bindings = weights(args.model)
    if args.data is not None:
        files = [*files, 'data/files.gin']
        bindings = [*bindings, f'PATHS = {places(args.data)!r}', f'KIND = {KINDS[command]!r}']
    if args.columns is not None:
        bindings = [*bindings, f'COLUMNS = {columns(args.columns)!r}']
    return files, bindings, remaining


def weights(model: str | None) -> tuple[list[str], list[str]]:
    """Return the gin files and bindings that `--model` stands for."""
    if model is None:
        return [], []
    return ['models/from_hf.gin'], [f'INITIAL_CHECKPOINT_PATH = {absolute(model)!r}']


def places(text: str) -> str | list[str]:
    """Return the place or places of `--data`, the local ones absolute."""
    if not all(names := text.split(',')):
        raise UserError(f"--data='{text}': give {DATA.removeprefix('rows: ')}")
    return absolute_places(names if len(names) > 1 else names[0])


def absolute_places(value: Any) -> Any:
    """Return a value of PATHS with its local paths absolute; one that is no path, such as a macro's name, as it is."""
    if isinstance(value, str):
        return value if value.startswith(('hf:', 'tfds:')) else absolute(value)
    if isinstance(value, list | tuple):
        return type(value)(map(absolute_places, value))
    return {key: absolute_places(item) for key, item in value.items()} if isinstance(value, dict) else value


def columns(text: str | None) -> dict[str, str]:
    """Return the columns of `--columns`: {our name: the rows'}."""
    pairs = [pair.partition('=')[::2] for pair in text.split(',')] if text is not None else []
    if not all(name and column for name, column in pairs):
        raise UserError(f"--columns='{text}': write NAME=COLUMN, as in prompt=question,chosen=good")
    return {name: column for name, column in pairs}  # noqa: C416 (pyright takes a slice's tuples for any length)


def absolute(path: str) -> str:
    """Return an absolute path, so that it is valid in every working folder."""
    return path if '://' in path or path.startswith('package:') else os.path.abspath(os.path.expanduser(path))


def parse_locations(command: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """Parse T5X's flags for data locations and pass them to SeqIO.

    Returns:
      The flags that are set, and the remaining arguments.

    Raises:
      UserError: a folder does not exist.
    """
    parser = Parser(prog=f'perl_jax {command}', add_help=False)
    names = NAMES[-2:]
    for name in names:
        parser.add_argument(name, default='')
    parsed, remaining = parser.parse_known_args(argv)
    set_flags = {name: value for name, value in zip(names, vars(parsed).values(), strict=True) if value}
    if not set_flags:
        return [], remaining
    load_tensorflow()
    import seqio
    import tensorflow as tf

    dirs = {name: [path for path in value.split(',') if path] for name, value in set_flags.items()}
    for name, path in ((name, path) for name, paths in dirs.items() for path in paths):
        if not tf.io.gfile.isdir(path):
            raise UserError(f"{command}: {name}: there is no folder '{path}'")
    seqio.add_global_cache_dirs(dirs.get(names[0], []))
    if names[1] in set_flags:
        seqio.set_tfds_data_dir_override(set_flags[names[1]])
    return [f'{name}={value}' for name, value in set_flags.items()], remaining


def load_tensorflow() -> None:
    """Import TensorFlow with stderr silenced, since the import writes to it at any log level."""
    with silenced():
        import tensorflow  # noqa: F401
