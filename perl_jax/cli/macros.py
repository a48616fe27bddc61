"""Refuses or reports macros that nothing reads, which gin ignores silently."""

from __future__ import annotations

import difflib
import functools
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import perl_jax
from perl_jax.cli import t5x_names
from perl_jax.errors import UserError

EXAMPLES = {  # of what a required macro may be, as its flag's value
    'MODEL_DIR': "'runs/mine'",
    'INITIAL_CHECKPOINT_PATH': "'runs/sft'",
    'REWARD_MODEL_DIR': "'runs/reward'",
    'MIXTURE_OR_TASK_NAME': "'toy_sft'",
    'TASK_FEATURE_LENGTHS': "{'inputs': 512, 'targets': 128}",
    'TRAIN_STEPS': '1000',
    'PATHS': "'rows.jsonl'",
    'KIND': "'pairs'",
}
_MACRO = re.compile(r'^(\w+)\s*=|%(\w+)', re.MULTILINE)


def missing() -> list[str]:
    """Return the macros of gin's configuration that are required, or read, and have no value."""
    import gin.config

    config = gin.config._CONFIG
    unbound = {name for name in _references(config) if (name, 'gin.macro') not in config}
    required = {x for (x, selector), values in config.items() if selector == 'gin.macro' and _is_required(values)}
    return sorted(unbound | required)


def describe_missing(names: list[str]) -> str:
    """Return a line about missing macros, with flags that work when they are pasted into a shell."""
    flags = [
        '--gin_file=models/from_hf.gin' if name == 'NETWORK'
        else f'--gin.{name}="{EXAMPLES.get(name, "VALUE")}"'
        for name in names
    ]  # fmt: skip
    return f'{", ".join(names)} {"are" if len(names) > 1 else "is"} not given; add {" ".join(flags)}'


def _references(config: Mapping[Any, Any]) -> set[str]:
    import gin.config

    macro = gin.config.get_configurable(gin.config.macro)
    return {reference.config_key[0] for reference in gin.config.iterate_references(config, to=macro)}


def _is_required(values: Mapping[str, Any]) -> bool:
    import gin.config

    value = values.get('value')
    if not isinstance(value, gin.config.ConfigurableReference) or value.config_key[1] != 'gin.constant':
        return False
    return value.scoped_configurable_fn() is gin.config.REQUIRED


def check(text: str, file_macros: set[str], flag_macros: set[str], t5x_values: Mapping[str, Any]) -> None:
    """Refuse macros that nothing reads: any of flags; of files those of T5X, and those that look misspelt.

    A file may set macros that only some others read: the package's own are let pass, and of the rest a warning tells.

    Args:
      text: the bindings as gin text.
      file_macros: the macros that files set.
      flag_macros: the macros that flags set.
      t5x_values: the values of those `t5x_names.MACROS` that are set.

    Raises:
      UserError: one of them, with what to use instead, or the nearest names.
    """
    used_macros = set(re.findall(r'%(\w+)', text))
    unread = (file_macros | flag_macros) - used_macros
    has_t5x = re.search(r'^(from|import) t5x\b', text, re.MULTILINE)
    t5x_names.check({name: value for name, value in t5x_values.items() if has_t5x or name in unread})
    t5x_names.check_unread(unread - (set(t5x_names.OF_MODEL_FILES) - flag_macros if has_t5x else set()))
    for macro in sorted(unread - file_macros - set(t5x_names.MACROS)):
        raise UserError(_nothing_reads(macro, file_macros | used_macros) + (f' ({t5x_names.PAGE})' if has_t5x else ''))
    for macro in sorted((unread & file_macros) - _of_package() - set(t5x_names.MACROS)):
        if not has_t5x and _similar(macro, _of_package() | used_macros):
            raise UserError(_nothing_reads(macro, _of_package() | used_macros))
        logging.getLogger('perl_jax').warning(f"gin: nothing reads the macro '{macro}', which a file sets")


def _nothing_reads(macro: str, known_macros: set[str]) -> str:
    nearest = ', '.join(_similar(macro, known_macros)) or 'none'
    return f"gin: nothing reads a macro called '{macro}'; nearest: {nearest}"


def _similar(macro: str, known_macros: set[str]) -> list[str]:
    return difflib.get_close_matches(macro, sorted(known_macros), n=3, cutoff=0.75)


@functools.cache
def _of_package() -> set[str]:
    """Returns the macros that the package's own gin files set or read."""
    files = pathlib.Path(perl_jax.__file__).parent.joinpath('gin').rglob('*.gin')
    return {name for file in files for pair in _MACRO.findall(file.read_text()) for name in pair if name}
