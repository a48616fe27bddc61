"""From gin files and flags to a function that is ready to be called. The only module that knows gin."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import perl_jax
from perl_jax.cli import configurables, old_names, t5x_names
from perl_jax.errors import UserError
from perl_jax.parallel.stderr import silenced
from perl_jax.runs import resume


class Parser(argparse.ArgumentParser):
    """Errors as UserError: one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f'{self.prog.removeprefix("perl_jax ")}: {message}')


def flags(command: str, argv: list[str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """T5X's flags out of `argv`: files, bindings, search paths, and what is left."""
    parser = Parser(prog=f'perl_jax {command}', add_help=False)
    for name in ('--gin_file', '--gin_bindings'):
        parser.add_argument(name, action='append', default=[])
    parser.add_argument('--gin_search_paths', default='')
    rewritten = []
    for word in argv:  # T5X's rewrite_gin_args
        if word.startswith('--gin.'):
            name, equals, value = word.removeprefix('--gin.').partition('=')
            if not equals:
                raise UserError(f"{command}: '{word}' has no value; write --gin.{name}=VALUE")
            rewritten.append(f'--gin_bindings={name} = {value}')
        else:
            rewritten.append(word)
    known, rest = parser.parse_known_args(rewritten)
    _, rest = data_flags(command, rest)
    return known.gin_file, known.gin_bindings, [p for p in known.gin_search_paths.split(',') if p], rest


def data_flags(command: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """T5X's flags of where data lies, which SeqIO is told here: those that were given, and what is left of `argv`.

    Raises:
      UserError: a folder that is not there.
    """
    parser = Parser(prog=f'perl_jax {command}', add_help=False)
    names = '--seqio_additional_cache_dirs', '--tfds_data_dir'
    for name in names:
        parser.add_argument(name, default='')
    known, rest = parser.parse_known_args(argv)
    given = {name: value for name, value in zip(names, vars(known).values(), strict=True) if value}
    if not given:
        return [], rest
    load_tensorflow()
    import seqio
    import tensorflow as tf

    dirs = {name: [path for path in value.split(',') if path] for name, value in given.items()}
    for name, path in ((name, path) for name, paths in dirs.items() for path in paths):
        if not tf.io.gfile.isdir(path):
            raise UserError(f"{command}: {name}: there is no folder '{path}'")
    seqio.add_global_cache_dirs(dirs.get(names[0], []))
    if names[1] in given:
        seqio.set_tfds_data_dir_override(given[names[1]])
    return [f'{name}={value}' for name, value in given.items()], rest


def configured(name: str, files: list[str], bindings: list[str], paths: list[str]) -> Callable[..., Any]:
    """The configurable `name` after the gin files and bindings are read."""
    import gin.config

    theirs = _read(files, paths)
    macros = set(_MACRO.findall(gin.config_str()))
    for binding in bindings:
        with _one_line(binding):
            gin.parse_config(old_names.translate(binding))
        theirs |= _of_t5x(_MACRO.findall(binding))
    if re.search(r'^(from|import) t5x\b', gin.config_str(), re.MULTILINE):
        t5x_names.check(theirs)
    used = set(re.findall(r'%(\w+)', gin.config_str()))
    for macro in set(_MACRO.findall(gin.config_str())) - macros - used:  # gin would say nothing
        near = difflib.get_close_matches(macro, sorted(macros | used), n=3, cutoff=0.4)
        nearest = f'nearest: {", ".join(near) or "none"} ({t5x_names.PAGE})'
        raise UserError(f"gin: nothing reads a macro called '{macro}'; {nearest}")
    with _one_line():
        gin.bind_parameter('perl_jax.runs.RunConfig.config_text', operative)  # asked once all is set
        gin.bind_parameter('perl_jax.runs.RunConfig.check_resume', _check_resume)
        gin.finalize()

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return gin.get_configurable(name)(*args, **kwargs)
        except TypeError as error:
            if lacking := re.search(r'No values supplied by Gin or caller for arguments: \[(.*?)\]', str(error)):
                raise UserError(f'gin: {name} lacks {lacking[1]}; is the recipe one for this command?') from error
            raise

    return checked


def binding(name: str, files: list[str], paths: list[str]) -> Any:
    """What gin files bind to 'configurable.parameter', made as it is for a run; None where they bind nothing."""
    _read(files, paths)
    import gin.config

    configurable, _, parameter = name.rpartition('.')
    with _one_line():
        return gin.get_bindings(configurable).get(parameter)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Leaves gin unlocked and empty and SeqIO's folders as they were, for who calls a command in their own process."""
    seqio = sys.modules.get('seqio')
    dirs = [*seqio.utils.get_global_cache_dirs()] if seqio else []
    try:
        yield
    finally:
        if 'gin' in sys.modules:
            sys.modules['gin'].clear_config()
        if seqio := sys.modules.get('seqio'):
            seqio.set_global_cache_dirs(dirs)
            seqio.set_tfds_data_dir_override(None)


def operative(vocabulary: str | None = None) -> str:
    """What a run has used, as a gin file: its config.gin. `vocabulary` is what VOCABULARY came to be.

    What a macro made, gin notes under a scope of the macro's name, and that is the stronger one: where the file is
    read, bindings of the plain name would change nothing. So that scope is left out, but where two use one name.
    """
    import gin.config

    for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items() if vocabulary else ():
        macro = (scope, selector) == ('VOCABULARY', 'gin.macro')
        key = 'value' if macro else 'vocabulary' if selector == 'perl_jax.data.DatasetConfig' else None
        if key in values and isinstance(values[key], str | None):  # a path may hang on the folder it was typed in
            values[key] = vocabulary
    _note_uncalled()
    text = gin.operative_config_str()
    scopes: dict[str, set[str]] = {}
    for scope, name in re.findall(rf'^(?:({"|".join(_MACRO.findall(text))})/)?([\w.]+)\.\w+ = ', text, re.MULTILINE):
        scopes.setdefault(name, set()).add(scope)
    for name, (scope, *others) in scopes.items():
        if scope and not others:
            scoped = rf'^(# Parameters for )?{scope}/{re.escape(name)}(?=[.:])'
            text = re.sub(scoped, rf'\g<1>{name}', text, flags=re.MULTILINE)
    return text


def _note_uncalled() -> None:
    """Have gin name what is bound of functions that are handed over, as shapings are: it notes them once called."""
    import gin.config

    text, used = gin.operative_config_str(), gin.config._OPERATIVE_CONFIG
    functions = [ref.rpartition('/')[::2] for ref in re.findall(r'@([\w./]+)(?![\w./(])', text)]
    for (scope, selector), values in gin.config._CONFIG.items():
        if any(scope == s and f'.{selector}'.endswith(f'.{name}') for s, name in functions):
            used.setdefault((scope, selector), dict(values))
    text = gin.operative_config_str()
    for macro in set(re.findall(r'%(\w+)', text)):  # that they are bound to; others are constants
        if (key := (macro, 'gin.macro')) in gin.config._CONFIG:
            used.setdefault(key, dict(gin.config._CONFIG[key]))


def settings(text: str) -> dict[str, Any]:
    """What a gin file such as a run's config.gin binds: {'SCOPE/CONFIGURABLE.PARAMETER' or 'MACRO': value}.

    References to configurables are the text that stands there, those to macros a resume.Macro.
    """
    from gin import config_parser

    class Text(config_parser.ParserDelegate):
        def configurable_reference(self, name: str, evaluate: bool) -> str:
            return f'@{name}{"()" if evaluate else ""}'

        def macro(self, name: str) -> resume.Macro:
            return resume.Macro(name)

    bound = {}
    for line in config_parser.ConfigParser(old_names.translate(text), Text()):
        if isinstance(line, config_parser.BindingStatement):
            name = f'{line.selector}.{line.arg_name}' if line.arg_name else line.selector
            bound[f'{line.scope}/{name}' if line.scope else name] = line.value
    return bound


def _check_resume(before: str, after: str) -> list[str]:
    return resume.check(settings(before), settings(after))


def _read(files: list[str], paths: list[str]) -> dict[str, Any]:
    """gin's configuration is what these files say; gives what they say of T5X's settings without effect."""
    load_tensorflow()
    import gin.config

    configurables.register()
    gin.clear_config()  # of an earlier call in this process
    here = os.path.dirname(perl_jax.__file__)
    t5x = importlib.util.find_spec('t5x')  # its gin files include each other from where it is installed
    installed = [os.path.dirname(path) for path in (t5x and t5x.submodule_search_locations) or ()]
    gin.config._LOCATION_PREFIXES[:] = ['', *paths, here, os.path.join(here, 'gin'), *installed]  # gin can only add
    # Files alone: gin's other reader takes a folder runs/ here for a Python package where a file includes runs/sft.gin.
    readers: list[Any] = [(_local, os.path.isfile), (_in_bucket, lambda path: '://' in path)]
    gin.config._FILE_READERS[:] = readers
    theirs: dict[str, Any] = {}
    for file in files:
        with _one_line():
            gin.parse_config_files_and_bindings([file], [], finalize_config=False)
        if not file.endswith(('models/from_t5x.gin', 'models/t5x_network.gin')):  # which turns off what it must
            theirs |= _of_t5x(t5x_names.MACROS)
    return theirs


def _of_t5x(macros: Iterable[str]) -> dict[str, Any]:
    """Which of T5X's settings without effect have a value among these macros."""
    import gin.config

    values = {name: gin.config._CONFIG.get((name, 'gin.macro'), {}) for name in macros if name in t5x_names.MACROS}
    return {name: x['value'] for name, x in values.items() if isinstance(x.get('value', ()), str | int | float | None)}


def phase(files: list[str], paths: list[str]) -> str:
    """Which run these gin files are of: sft, reward or policy."""
    _read(files, paths)
    for name in 'sft', 'reward', 'policy':
        if f'train_{name}.train.' in text():
            return name
    raise UserError(f"gin: '{files[0]}' is no recipe of sft, reward or policy")


_MACRO = re.compile(r'^(\w+) = ', re.MULTILINE)


def _local(path: str) -> Any:
    with open(path) as file:
        return _Text(path, file.read())


def _in_bucket(path: str) -> Any:
    from etils import epath

    return _Text(path, epath.Path(path).read_text())


class _Text(io.StringIO):
    """A gin file in today's names; gin's messages give its `name`."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(old_names.translate(text))
        self.name = path


def text() -> str:
    """The bindings that were read, as a gin file."""
    import gin.config

    return gin.config_str()


def load_tensorflow() -> None:
    """Every command but report and average needs it, and its import writes to stderr whatever its log level."""
    with silenced():
        import tensorflow  # noqa: F401


@contextlib.contextmanager
def _one_line(binding: str | None = None) -> Iterator[None]:
    """What gin says of its files, or of one binding, as a UserError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, OSError, SyntaxError, NameError, ImportError, AttributeError) as error:
        text = ' '.join(str(error).split())
        if macro := re.match(r"(?:No bindings specified for ')?([\w.]+)/(?:gin\.)?macro", text):
            text = f'{macro[1]} is not given; add --gin.{macro[1]}=VALUE'
        elif 'Unable to open file' in text or 'No such file' in text:
            text += ' Recipes are named like recipes/toy_sft.gin'
        elif 'No configurable matching' in text or 'train_script' in text:
            text += f' {t5x_names.PAGE}'
        elif isinstance(error, SyntaxError) and binding:
            text = f"cannot read the value in '{binding}'; strings need inner quotes: --gin.NAME=\"'text'\""
        raise UserError(f'gin: {text}') from error
