"""The command line: T5X's gin flags, one command a phase. The only module that knows gin."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from perl_jax import __version__
from perl_jax.errors import UserError

HELP = """\
PERL (arXiv 2403.10704) in JAX: reward models and RL policies trained with LoRA on one frozen base.

  perl_jax sft      --gin_file=recipes/toy_sft.gin    --gin.MODEL_DIR="'runs/toy/sft'"
  perl_jax reward   --gin_file=recipes/toy_reward.gin --gin.MODEL_DIR="'runs/toy/reward'" \\
                    --gin.INITIAL_CHECKPOINT_PATH="'runs/toy/sft'"
  perl_jax policy   --gin_file=recipes/toy_policy.gin --gin.MODEL_DIR="'runs/toy/policy'" \\
                    --gin.INITIAL_CHECKPOINT_PATH="'runs/toy/sft'" --gin.REWARD_MODEL_DIR="'runs/toy/reward'"
  perl_jax eval     --model_dir=runs/toy/policy --split=test     measure a finished run again
  perl_jax sample   --model_dir=runs/toy/policy                  read some answers
  perl_jax judge    --model_dir=runs/toy/policy --against=sft --judge=runs/toy/reward   win rate
  perl_jax report   runs/toy/sft runs/toy/reward runs/toy/policy one HTML page of curves, answers and settings
  perl_jax inspect  --task=toy_pairs                             a task's examples and lengths
  perl_jax export   --model_dir=runs/toy/policy --format=hf --output=out    for transformers; or peft, or t5x
  perl_jax import   --format=peft --input=DIR --model_dir=runs/theirs --gin_file=models/llama3_2_1b.gin

sft, reward and policy take T5X's flags, as does eval on top of a run's own config.gin:
  --gin_file=FILE          a gin file; repeatable, later ones override (add tuning/full.gin for full tuning)
  --gin.NAME=VALUE         one binding or macro; strings need inner quotes: --gin.MODEL_DIR="'runs/x'"
  --gin_bindings='A = 1'   the same in gin's own words; repeatable
  --gin_search_paths=A,B   where gin files are looked for, before the package's own gin/
The same command again goes on where the run was. Recipes lie in perl_jax/gin/recipes; start by reading one.
"""

FORMATS = ('hf', 'peft', 't5x')  # exchange.py
RUNS = {'sft': 'train_sft', 'reward': 'train_reward', 'policy': 'train_policy'}


def cli(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for an error that the user can mend, said in one line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(HELP, end='')
        return 0
    if argv[0] == '--version':
        print(f'perl_jax {__version__}')
        return 0
    _quiet()
    try:
        command, rest = argv[0], argv[1:]
        if command not in _COMMANDS:
            raise UserError(f"no command is called '{command}'; there are {', '.join(_COMMANDS)} (perl_jax --help)")
        _COMMANDS[command](rest)
    except UserError as error:  # gin and TensorFlow write around it where it passed
        message = str(error).rpartition('UserError: ')[2].strip().partition('\n')[0]
        print(f'perl_jax: {message}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print('perl_jax: interrupted; the same command goes on from the last checkpoint', file=sys.stderr)
        return 130
    return 0


def _quiet() -> None:
    """Our own warnings on stderr, the libraries' chatter not."""
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    logging.basicConfig(level=logging.CRITICAL)
    logging.getLogger('absl').setLevel(logging.CRITICAL)
    ours, handler = logging.getLogger('perl_jax'), logging.StreamHandler()
    handler.setFormatter(logging.Formatter('perl_jax: %(message)s'))
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
    sys.path.insert(0, os.getcwd())  # a user's own task modules, as under python -m


def _run(command: str, argv: list[str]) -> None:
    files, bindings, paths, rest = _gin_flags(command, argv)
    if rest:
        raise UserError(f"{command}: unknown argument '{rest[0]}' (perl_jax --help)")
    if not files:
        raise UserError(f'{command}: give a recipe, such as --gin_file=recipes/toy_{command}.gin')
    _configured(f'{RUNS[command]}.train', files, bindings, paths)()


def _evaluate(argv: list[str]) -> None:
    option = ('--split', {'default': 'validation', 'help': 'which split to measure'})
    _with_model_dir('eval', argv, [option])


def _sample(argv: list[str]) -> None:
    options = [
        ('--prompt', {'help': "answer this text; without it, some of the task's prompts"}),
        ('--num', {'type': int, 'default': 5, 'help': 'how many prompts'}),
    ]
    _with_model_dir('sample', argv, options)


def _with_model_dir(command: str, argv: list[str], options: list[tuple[str, dict[str, Any]]]) -> None:
    """eval, sample and export: the run's own config.gin, then the user's bindings on top."""
    from perl_jax import rundir

    files, bindings, paths, rest = _gin_flags(command, argv)
    parser = _Parser(prog=f'perl_jax {command}')
    parser.add_argument('--model_dir', required=True, help='MODEL_DIR of a run')
    for name, settings in options:
        parser.add_argument(name, **settings)
    args = vars(parser.parse_args(rest))
    about = rundir.read(args['model_dir'])
    if about is None:
        raise UserError(f"{command}: '{args['model_dir']}' is not the MODEL_DIR of a run: it has no run.json")
    kind = 'reward' if about['phase'] == 'reward' else 'policy'
    if (command, kind) == ('sample', 'reward'):
        raise UserError(f"sample: '{args['model_dir']}' is a run of reward, which gives no answers; name a policy's")
    ours, name = f'runs/infer_{about["phase"]}.gin', f'infer.{command}_{kind}'
    if command == 'export':
        ours, name = 'runs/export.gin', 'exchange.export_run'
    files = [os.path.join(args['model_dir'], 'config.gin'), ours, *files]
    _configured(name, files, bindings, paths)(**args)


def _export(argv: list[str]) -> None:
    options = [
        ('--format', {'required': True, 'choices': FORMATS}),
        ('--output', {'required': True, 'help': 'the folder to write'}),
        ('--dtype', {'default': 'float32', 'choices': ('float32', 'bfloat16', 'float16'), 'help': 'of merged weights'}),
    ]
    _with_model_dir('export', argv, options)


def _import(argv: list[str]) -> None:
    import gin

    files, bindings, paths, rest = _gin_flags('import', argv)
    parser = _Parser(prog='perl_jax import')
    parser.add_argument('--format', required=True, choices=FORMATS)
    parser.add_argument('--input', required=True, help="a checkpoint's or adapter's folder; hf://OWNER/NAME, gs://...")
    parser.add_argument('--model_dir', required=True, help='the MODEL_DIR to make')
    args = vars(parser.parse_args(rest))
    run = _configured('exchange.import_run', ['runs/import.gin', *files], bindings, paths)
    run(**args, config_text=gin.config_str())


def _judge(argv: list[str]) -> None:
    from perl_jax import rundir
    from perl_jax.judging import judge

    files, bindings, paths, rest = _gin_flags('judge', argv)
    parser = _Parser(prog='perl_jax judge')
    for name, settings in judge.FLAGS.items():
        parser.add_argument(name, **settings)
    args = vars(parser.parse_args(rest))

    def of_run(model_dir: str, name: str) -> Callable[..., Any]:
        """A function under the configuration of one of the runs; the user's bindings are for those that answer."""
        own = (files, bindings) if name == 'infer.answer_split' else ([], [])
        about = rundir.read(model_dir)
        imported = name == 'judging.models.ask' and 'imported' in about  # it has no data set
        ours = 'runs/judge_imported.gin' if imported else f'runs/infer_{about["phase"]}.gin'
        config = [os.path.join(model_dir, 'config.gin'), ours, *own[0]]
        return _configured(name, config, own[1], paths)  # to be called before the next: gin holds one at a time

    judge.run(of_run, **args)


def _report(argv: list[str]) -> None:
    from perl_jax import report

    parser = _Parser(prog='perl_jax report')
    parser.add_argument('runs', nargs='+', metavar='MODEL_DIR', help='one run, or several to compare')
    parser.add_argument('--output', help='the page; default: report.html beside the runs')
    args = parser.parse_args(argv)
    print(report.write(args.runs, args.output))


def _inspect(argv: list[str]) -> None:
    _load_tensorflow()
    from perl_jax import inspect_task

    parser = _Parser(prog='perl_jax inspect')
    parser.add_argument('--task', required=True, help='a registered SeqIO task or mixture')
    parser.add_argument('--module', action='append', default=[], help='import this first (your own tasks); repeatable')
    parser.add_argument('--split', default='train')
    parser.add_argument('--num', type=int, default=3, help='how many examples to show')
    parser.add_argument(
        '--vocabulary', help="a tokenizer.json, .model or .gguf to count tokens with, in place of the task's own"
    )
    inspect_task.show(**vars(parser.parse_args(argv)))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{command: functools.partial(_run, command) for command in RUNS},
    'eval': _evaluate,
    'sample': _sample,
    'judge': _judge,
    'report': _report,
    'inspect': _inspect,
    'export': _export,
    'import': _import,
}


class _Parser(argparse.ArgumentParser):
    """Errors as UserError: one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> None:
        raise UserError(f'{self.prog.removeprefix("perl_jax ")}: {message}')


def _gin_flags(command: str, argv: list[str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """T5X's flags out of `argv`: files, bindings, search paths, and what is left."""
    parser = _Parser(prog=f'perl_jax {command}', add_help=False)
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
    return known.gin_file, known.gin_bindings, [p for p in known.gin_search_paths.split(',') if p], rest


def _configured(name: str, files: list[str], bindings: list[str], paths: list[str]) -> Callable[..., Any]:
    """The configurable `name` after the gin files and bindings are read."""
    _load_tensorflow()
    import gin

    _register()
    gin.clear_config()  # of an earlier call in this process
    here = os.path.dirname(__file__)
    t5x = importlib.util.find_spec('t5x')  # its gin files include each other from where it is installed
    theirs = [os.path.dirname(path) for path in t5x.submodule_search_locations] if t5x else []
    gin.config._LOCATION_PREFIXES[:] = ['', *paths, here, os.path.join(here, 'gin'), *theirs]  # gin can only add
    # Files alone: gin's other reader takes a folder runs/ here for a Python package where a file includes runs/sft.gin.
    gin.config._FILE_READERS[:] = [(open, os.path.isfile)]
    with _one_line():
        gin.parse_config_files_and_bindings(files, [], finalize_config=False)
    macros = set(_MACRO.findall(gin.config_str()))
    for binding in bindings:
        with _one_line(binding):
            gin.parse_config(binding)
    used = set(re.findall(r'%(\w+)', gin.config_str()))
    for macro in set(_MACRO.findall(gin.config_str())) - macros - used:  # gin would say nothing
        near = difflib.get_close_matches(macro, sorted(macros | used), n=3, cutoff=0.4)
        raise UserError(f"gin: nothing reads a macro called '{macro}'; nearest: {', '.join(near) or 'none'}")
    with _one_line():
        gin.bind_parameter('perl_jax.runs.RunConfig.config_text', gin.operative_config_str)  # asked once all is set
        gin.finalize()

    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            return gin.get_configurable(name)(*args, **kwargs)
        except TypeError as error:
            if lacking := re.search(r'No values supplied by Gin or caller for arguments: \[(.*?)\]', str(error)):
                raise UserError(f'gin: {name} lacks {lacking[1]}; is the recipe one for this command?') from error
            raise

    return checked


_MACRO = re.compile(r'^(\w+) = ', re.MULTILINE)


@functools.cache
def _register() -> None:
    """What gin files may name without importing it. For a user's own: `from __gin__ import dynamic_registration`."""
    import gin
    import optax

    from perl_jax import base, data, exchange, infer, layers, lora, partitioning, rewards, runs, sampling
    from perl_jax.interop import hf, tokenizers
    from perl_jax.judging import models
    from perl_jax.networks import decoder, t5

    ours = [
        base.BaseConfig, data.DatasetConfig, lora.LoraSpec, lora.FullSpec, partitioning.Partitioner, runs.RunConfig,
        rewards.LearnedReward, rewards.TextReward, sampling.SamplingConfig, decoder.Decoder, decoder.DecoderConfig,
        t5.T5, t5.T5Config, layers.RopeScaling, hf.network, tokenizers.TokenizersVocabulary, infer.eval_policy,
        infer.eval_reward, infer.sample_policy, infer.answer_split, models.ask, models.score,
        exchange.export_run, exchange.import_run,
    ]  # fmt: skip
    theirs = [
        optax.adafactor, optax.adam, optax.adamw, optax.sgd, optax.chain, optax.clip_by_global_norm,
        optax.linear_schedule, optax.warmup_constant_schedule, optax.warmup_cosine_decay_schedule,
    ]  # fmt: skip
    for thing in ours:
        gin.external_configurable(thing, module=thing.__module__)
    for thing in theirs:
        gin.external_configurable(thing, module='optax')
    for module in RUNS.values():  # all of them, so that config.gin of any run can be read by any command
        gin.external_configurable(importlib.import_module(f'perl_jax.{module}').train, module=f'perl_jax.{module}')
    gin.constant('lora.ALL_LINEAR', lora.ALL_LINEAR)
    gin.constant('lora.ATTENTION', lora.ATTENTION)


def _load_tensorflow() -> None:
    """Every command but report needs it, and its import writes to stderr whatever its log level."""
    stderr = os.dup(2)
    with open(os.devnull, 'w') as null:
        os.dup2(null.fileno(), 2)
    try:
        import tensorflow  # noqa: F401
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


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
        elif isinstance(error, SyntaxError) and binding:
            text = f"cannot read the value in '{binding}'; strings need inner quotes: --gin.NAME=\"'text'\""
        raise UserError(f'gin: {text}') from error
