"""Configures functions from gin files and flags. The only module that uses gin."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import perl_jax
from perl_jax.cli import configurables, data_flags, macros, old_names, t5x_names, unread
from perl_jax.cli.parser import Parser
from perl_jax.errors import UserError
from perl_jax.runs import provenance, resume
from perl_jax.settings import SettingError

# What gin raises, and the parser of Python that reads its values: brackets that are not closed, or too many.
_UNREADABLE = SyntaxError, tokenize.TokenError, RecursionError, MemoryError
_GIN_ERRORS = *_UNREADABLE, ValueError, TypeError, KeyError, OSError, NameError, ImportError, AttributeError


def parse_flags(command: str, argv: list[str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """Parse T5X's gin flags: returns files, bindings, search paths and the remaining arguments."""
    parser = Parser(prog=f'perl_jax {command}', add_help=False)
    for name in ('--gin_file', '--gin_bindings'):
        parser.add_argument(name, action='append', default=[])
    parser.add_argument('--gin_search_paths', default='')
    rewritten = []
    for argument in argv:  # T5X's rewrite_gin_args
        if argument.startswith('--gin.'):
            name, equals, value = argument.removeprefix('--gin.').partition('=')
            if not equals:
                raise UserError(f"{command}: '{argument}' has no value; write --gin.{name}=VALUE")
            rewritten.append(f'--gin_bindings={name} = {value}')
        else:
            rewritten.append(argument)
    parsed, remaining = parser.parse_known_args(rewritten)
    _, remaining = data_flags.parse_locations(command, remaining)
    search_paths = [path for path in parsed.gin_search_paths.split(',') if path]
    return parsed.gin_file, parsed.gin_bindings, search_paths, remaining


def configured(
    name: str, files: list[str], bindings: list[str], paths: list[str], unneeded: Iterable[str] = ()
) -> Callable[..., Any]:
    """Read gin files and bindings and return the configurable `name`.

    Args:
      name: a name of configurables.py.
      files: gin files; later ones override earlier ones.
      bindings: gin bindings, which override the files.
      paths: folders to search for gin files, before the package's.
      unneeded: macros that are None where nothing sets them, though a file requires them.

    Raises:
      UserError: an invalid file or binding, or one of `bindings` that nothing uses; or macros without a value.
    """
    import gin.config

    t5x_values, user_texts = _read(files, paths)
    file_macros, flag_macros = set(_MACRO.findall(gin.config_str())), set()
    for binding in bindings:
        with _gin_errors(binding):
            gin.parse_config(old_names.translate(binding))
        flag_macros |= set(_MACRO.findall(binding))
    macros.check(gin.config_str(), file_macros, flag_macros, t5x_values | _t5x_values(flag_macros))
    missing = macros.missing()
    gin.parse_config([f'{name} = None' for name in missing if name in unneeded])
    if missing := [name for name in missing if name not in unneeded]:
        raise UserError(f'gin: {macros.describe_missing(missing)}')
    with _gin_errors():
        gin.bind_parameter('perl_jax.runs.RunConfig.config_text', operative_config_text)  # called when complete
        gin.bind_parameter('perl_jax.runs.RunConfig.check_resume', _check_resume)
        gin.bind_parameter('perl_jax.runs.RunConfig.provenance', provenance.describe)
        gin.finalize()
    file_names = [x for text in user_texts if name.startswith('train_') for x in settings(text)]

    def call(*args: Any, **kwargs: Any) -> Any:
        configurable = gin.get_configurable(name)
        has_value = kwargs.keys() | gin.get_bindings(name, resolve_references=False)
        parameters = list(inspect.signature(configurable).parameters.values())[len(args) :]
        named = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
        missing = [p.name for p in parameters if p.default is p.empty and p.kind in named and p.name not in has_value]
        if missing:  # gin itself would name those of positional parameters alone
            raise UserError(f'gin: {name} lacks {", ".join(missing)}; is the recipe one for this command?')
        supplied = {*kwargs, *list(inspect.signature(configurable).parameters)[: len(args)]}
        unread.check(name, supplied, [x for binding in bindings for x in settings(binding)], file_names)
        try:
            return configurable(*args, **kwargs)
        except SettingError as error:
            shown_name = _name_of(error.setting, kwargs)
            if error.problem.startswith(' = None: ') and shown_name.isupper():  # a macro that the recipe leaves open
                raise UserError(macros.describe_missing([shown_name])) from error
            raise UserError(f'{shown_name}{error.problem}') from error
        except TypeError as error:
            if match := re.search(r'No values supplied by Gin or caller for arguments: \[(.*?)\]', str(error)):
                raise UserError(f'gin: {name} lacks {match[1]}; is the recipe one for this command?') from error
            raise

    return call


def planner(phase: str, files: list[str], bindings: list[str], paths: list[str]) -> Callable[..., Any]:
    """Configure the planner of a phase from the run's gin files, as `configured`; no weights are read or written."""
    gin_files, unneeded = [*files, f'runs/plan_{phase}.gin'], ('MODEL_DIR', 'INITIAL_CHECKPOINT_PATH')
    return configured(f'programs.{phase}', gin_files, bindings, paths, unneeded)


def _name_of(setting: str, arguments: Mapping[str, Any]) -> str:
    """Return the name by which the user gave a setting 'Class.field': a flag, a macro, or that name."""
    field = setting.rpartition('.')[2]
    if field in arguments:
        return f'--{field}'
    values = settings(current_config_text())
    names = {x for name, x in values.items() if isinstance(x, resume.Macro) and re.search(rf'\b{setting}$', name)}
    return ' or '.join(sorted(names)) or setting


def bindings(name: str, files: list[str], paths: list[str]) -> list[Any]:
    """Return what each gin file binds to 'configurable.parameter', evaluated as in a run; None where unbound."""
    configurable, _, parameter = name.rpartition('.')
    values = []
    for file in files:
        _read([file], paths)
        import gin.config

        with _gin_errors():
            values.append(gin.get_bindings(configurable).get(parameter))
    return values


@contextlib.contextmanager
def restored_state() -> Iterator[None]:
    """Clear and unlock gin and restore SeqIO's folders on exit, for callers that run commands in their own process."""
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


def operative_config_text(vocabulary: str | None = None) -> str:
    """Return the operative configuration of a run as gin text, for its config.gin.

    gin records the parameters of an object made by a macro under a scope with the macro's name. Scoped bindings take
    precedence, so overrides by the plain name would have no effect when the file is read again. Therefore the scope is
    removed, unless several scopes use one name.

    Args:
      vocabulary: the resolved path of the vocabulary, which replaces the value of VOCABULARY.
    """
    import gin.config

    for (scope, selector), values in gin.config._OPERATIVE_CONFIG.items():  # a path may be relative to this folder
        macro = scope if selector == 'gin.macro' else None
        key = 'value' if macro == 'VOCABULARY' else 'vocabulary' if selector == 'perl_jax.data.DatasetConfig' else None
        if vocabulary and key in values and isinstance(values[key], str | None):
            values[key] = vocabulary
        key = 'value' if macro == 'PATHS' else 'paths' if selector == 'perl_jax.files.task' else None
        if key in values:
            values[key] = data_flags.absolute_places(values[key])
    _record_uncalled_functions()
    text = gin.operative_config_str()
    scopes: dict[str, set[str]] = {}
    for scope, name in re.findall(rf'^(?:({"|".join(_MACRO.findall(text))})/)?([\w.]+)\.\w+ = ', text, re.MULTILINE):
        scopes.setdefault(name, set()).add(scope)
    for name, (scope, *others) in scopes.items():
        if scope and not others:
            scoped = rf'^(# Parameters for )?{scope}/{re.escape(name)}(?=[.:])'
            text = re.sub(scoped, rf'\g<1>{name}', text, flags=re.MULTILINE)
    return text


def _record_uncalled_functions() -> None:
    """Add the bindings of function references (such as shapings) to gin's operative configuration.

    gin records a function's parameters when it is called, and these functions have not been called yet.
    """
    import gin.config

    text, operative_config = gin.operative_config_str(), gin.config._OPERATIVE_CONFIG
    references = [reference.rpartition('/')[::2] for reference in re.findall(r'@([\w./]+)(?![\w./(])', text)]
    for (scope, selector), values in gin.config._CONFIG.items():
        if any(
            scope == reference_scope and f'.{selector}'.endswith(f'.{name}') for reference_scope, name in references
        ):
            operative_config.setdefault((scope, selector), dict(values))
    text = gin.operative_config_str()
    for macro in set(re.findall(r'%(\w+)', text)):  # macros in those bindings; other names are gin constants
        if (key := (macro, 'gin.macro')) in gin.config._CONFIG:
            operative_config.setdefault(key, dict(gin.config._CONFIG[key]))


def settings(text: str) -> dict[str, Any]:
    """Parse the bindings of gin text, such as a config.gin: {'SCOPE/CONFIGURABLE.PARAMETER' or 'MACRO': value}.

    References to configurables become their text, references to macros a resume.Macro.
    """
    from gin import config_parser

    class Text(config_parser.ParserDelegate):
        def configurable_reference(self, name: str, evaluate: bool) -> str:
            return f'@{name}{"()" if evaluate else ""}'

        def macro(self, name: str) -> resume.Macro:
            return resume.Macro(name)

    bindings = {}
    for line in config_parser.ConfigParser(old_names.translate(text), Text()):
        if isinstance(line, config_parser.BindingStatement):
            name = f'{line.selector}.{line.arg_name}' if line.arg_name else line.selector
            bindings[f'{line.scope}/{name}' if line.scope else name] = line.value
    return bindings


def _check_resume(before: str, after: str) -> dict[str, str]:
    return resume.check(settings(before), settings(after), configurables.default)


def _read(files: list[str], paths: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Load these files into gin.

    Returns:
      The values they give to T5X settings that have no effect here; the texts of those that are neither ours nor T5X's.
    """
    data_flags.load_tensorflow()
    import gin.config

    configurables.register()
    gin.clear_config()  # an earlier call in this process may have left bindings
    package_dir = os.path.dirname(perl_jax.__file__)
    t5x = importlib.util.find_spec('t5x')  # its gin files include each other relative to its installation
    t5x_dirs = [os.path.dirname(path) for path in (t5x and t5x.submodule_search_locations) or ()]
    prefixes = ['', *paths, package_dir, os.path.join(package_dir, 'gin'), *t5x_dirs]
    gin.config._LOCATION_PREFIXES[:] = prefixes  # gin's public function only appends
    # No package reader: where a file includes runs/sft.gin, it would take a user's folder runs/ for a Python package.
    user_texts: list[str] = []

    def open_local(path: str) -> Any:
        with open(path) as file:
            text = _Text(path, file.read())
        user_texts.extend([] if path.startswith((package_dir, *t5x_dirs)) else [text.getvalue()])
        return text

    readers: list[Any] = [(open_local, os.path.isfile), (_open_remote, lambda path: '://' in path)]
    gin.config._FILE_READERS[:] = readers
    t5x_values: dict[str, Any] = {}
    for file in files:
        with _gin_errors():
            gin.parse_config_files_and_bindings([file], [], finalize_config=False)
        if not file.endswith(('models/from_t5x.gin', 'models/t5x_network.gin')):  # these set such values on purpose
            t5x_values |= _t5x_values(t5x_names.MACROS)
    return t5x_values, user_texts


def _t5x_values(names: Iterable[str]) -> dict[str, Any]:
    """Return the values of those macros that are T5X settings without effect here."""
    import gin.config

    values = {name: gin.config._CONFIG.get((name, 'gin.macro'), {}) for name in names if name in t5x_names.MACROS}
    return {name: x['value'] for name, x in values.items() if isinstance(x.get('value', ()), str | int | float | None)}


def phase(files: list[str], paths: list[str]) -> str:
    """Return the phase that these gin files configure: sft, reward or policy."""
    _read(files, paths)
    for name in 'sft', 'reward', 'policy':
        if f'train_{name}.train.' in current_config_text():
            return name
    raise UserError(f"gin: '{files[0]}' is not a recipe of sft, reward or policy")


_MACRO = re.compile(r'^(\w+) = ', re.MULTILINE)


def _open_remote(path: str) -> Any:
    from etils import epath

    return _Text(path, epath.Path(path).read_text())


class _Text(io.StringIO):
    """A gin file with old names translated; gin's error messages use its `name`."""

    def __init__(self, path: str, text: str) -> None:
        super().__init__(old_names.translate(text))
        self.name = path


def current_config_text() -> str:
    """Return the current bindings as gin text."""
    import gin.config

    return gin.config_str()


@contextlib.contextmanager
def _gin_errors(binding: str | None = None) -> Iterator[None]:
    """Convert gin's errors about its files, or about one binding, into a UserError."""
    try:
        yield
    except SystemExit as error:
        raise UserError(f'gin: an imported module ended the program ({error.code!r}); mend that module') from error
    except _GIN_ERRORS as error:
        text = ' '.join(str(error).split())
        if 'Unable to open file' in text or 'No such file' in text:
            text += ' Recipes are named like recipes/toy_sft.gin'
        elif unknown := re.match(r"No configurable matching (?:reference )?'@?([\w.]+)", text):
            remedy = "correct it, or import its module in a gin file, below 'from __gin__ import dynamic_registration'"
            text += f'; {t5x_names.PAGE if t5x_names.is_configurable(unknown[1]) else remedy}'
        elif 'train_script' in text:
            text += f'; {t5x_names.PAGE}'
        elif isinstance(error, _UNREADABLE) and binding:
            text = f"cannot read the value in '{binding}'; strings need inner quotes: --gin.NAME=\"'text'\""
        raise UserError(f'gin: {text}') from error
