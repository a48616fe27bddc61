"""`perl_jax list`, `show` and `copy`: the gin files, tasks and settings that the package brings."""

from __future__ import annotations

import difflib
import importlib
import pathlib
import re

import perl_jax
from perl_jax.errors import UserError

GIN = pathlib.Path(perl_jax.__file__).parent / 'gin'
FOLDERS = ('recipes', 'models', 'data', 'tuning', 'algorithms', 'rewards', 'mesh', 'sweeps')
PHASES = ('sft', 'reward', 'policy')
KINDS = (*FOLDERS, 'tasks', 'settings')
_USAGE = """\
usage: perl_jax {phase} --gin_file=FILE [--gin.NAME=VALUE ..] [--data=ROWS] [--columns=NAME=COLUMN,..] [--model=WEIGHTS]

  --gin_file=FILE     a recipe, such as recipes/toy_{phase}.gin; repeatable, later ones override
  --gin.NAME=VALUE    a setting; strings need inner quotes: --gin.MODEL_DIR="'runs/x'"
  --data=ROWS         your own rows: a file, folder or pattern, hf:OWNER/NAME or tfds:NAME
  --columns=..        what their columns mean: prompt=question,chosen=good
  --model=WEIGHTS     a Hugging Face folder, hf://OWNER/NAME or a .gguf, or the MODEL_DIR of an SFT run
Further flags: perl_jax --help
"""
_INCLUDE = re.compile(r"^include '([^']+)'\n", re.MULTILINE)
_SETTING = re.compile(r'^([A-Z]\w*) = ([^#\n]*)', re.MULTILINE)


def lines(kind: str) -> list[str]:
    """Return what there is of a kind, a line each.

    Args:
      kind: one of KINDS: a folder of gin files, each with the first sentence of its comment; the registered tasks, each
        with its features; or the settings of the three phases, each with its default.
    """
    if kind == 'tasks':
        return _task_lines()
    if kind == 'settings':
        return [f'{phase:8}{name:24}{default}' for phase in PHASES for name, default in settings(phase).items()]
    files = sorted((GIN / kind).glob('*.gin'))
    return [f'{f"{kind}/{file.name}":32}{_first_sentence(file.read_text())}'.rstrip() for file in files]


def settings(phase: str) -> dict[str, str]:
    """Return the macros of a phase with their defaults as gin writes them, 'required' where there is none."""
    defaults = dict(_SETTING.findall(resolve(f'runs/{phase}.gin')))
    return {name: 'required' if value.strip() == '%gin.REQUIRED' else value.strip() for name, value in defaults.items()}


def phase_help(phase: str) -> str:
    """Return what a phase's `--help` prints: its flags, then the header of its gin file and the defaults."""
    header = re.match(r'(#.*\n)*', find(f'runs/{phase}.gin').read_text())[0]  # type: ignore[index]
    text = re.sub(r'^# ?', '', header, flags=re.MULTILINE)
    defaults = ''.join(f'  {name:26}{default}\n' for name, default in settings(phase).items())
    heading = 'Settings, as --gin.NAME=VALUE, and their defaults:'
    return f'{_USAGE.format(phase=phase)}\n{text}\n{heading}\n\n{defaults}'.rstrip()


def resolve(name: str) -> str:
    """Return the text of a gin file with each include replaced by the text of its file; later bindings override.

    Args:
      name: as in `--gin_file`, 'recipes/toy_sft.gin', or its last part, 'toy_sft'.

    Raises:
      UserError: there is no such file, or several; the message has the nearest names.
    """
    path = find(name)
    header = f'# {path.relative_to(GIN)}\n'
    return header + _INCLUDE.sub(lambda match: f'\n{resolve(match[1]).rstrip()}\n\n', path.read_text())


def copy(name: str, output: str) -> str:
    """Write a copy of a gin file, to be edited; its includes still name the package's files.

    Returns:
      The path of the copy.

    Raises:
      UserError: there is no such gin file, or `output` exists or cannot be written.
    """
    text, path = find(name).read_text(), pathlib.Path(output)
    try:
        with path.open('x') as file:  # never over a file of the user's
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"copy: '{output}' exists already; name another file") from error
    return str(path)


def find(name: str) -> pathlib.Path:
    """Return the path of a gin file of the package; raises as `resolve`."""
    names = {str(path.relative_to(GIN)): path for path in sorted(GIN.rglob('*.gin'))}
    stem = name.removesuffix('.gin')
    matches = [known for known in names if known.removesuffix('.gin') == stem or pathlib.Path(known).stem == stem]
    if len(matches) != 1:
        stems = {pathlib.Path(known).stem: known for known in names}
        nearest = matches or [stems.get(near, near) for near in difflib.get_close_matches(stem, [*names, *stems])]
        raise UserError(
            f"'{name}' is {'several files' if matches else 'no gin file of the package'}; nearest: "
            f'{", ".join(nearest) or "none"} (perl_jax list recipes, or models ..)'
        )
    return names[matches[0]]


def _first_sentence(text: str) -> str:
    comment = ' '.join(line.removeprefix('#').strip() for line in re.match(r'(#.*\n)*', text)[0].splitlines())  # type: ignore[index]
    return re.split(r'(?<=[.:;]) ', comment)[0].rstrip(':;.')


def _task_lines() -> list[str]:
    import seqio

    from perl_jax.tools.inspect_task import BUILTIN_MODULES

    for module in BUILTIN_MODULES:
        importlib.import_module(module)
    names = sorted(seqio.TaskRegistry.names())
    return [f'{name:40}{", ".join(seqio.TaskRegistry.get(name).output_features)}' for name in names]
