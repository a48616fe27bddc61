"""The command line: T5X's gin flags, one command a phase."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from perl_jax import __version__
from perl_jax.cli import configure, t5x_names
from perl_jax.errors import Lost, Preempted, UserError
from perl_jax.parallel import startup, survivor

HELP = """\
PERL (arXiv 2403.10704) in JAX: reward models and RL policies trained with LoRA on one frozen base.

  perl_jax sft      --gin_file=recipes/toy_sft.gin    --gin.MODEL_DIR="'runs/toy/sft'"
  perl_jax reward   --gin_file=recipes/toy_reward.gin --gin.MODEL_DIR="'runs/toy/reward'" \\
                    --gin.INITIAL_CHECKPOINT_PATH="'runs/toy/sft'"
  perl_jax policy   --gin_file=recipes/toy_policy.gin --gin.MODEL_DIR="'runs/toy/policy'" \\
                    --gin.INITIAL_CHECKPOINT_PATH="'runs/toy/sft'" --gin.REWARD_MODEL_DIR="'runs/toy/reward'"
  perl_jax eval     --model_dir=runs/toy/policy --split=test     measure a finished run again
  perl_jax sample   --model_dir=runs/toy/policy                  read some answers
  perl_jax judge    --model_dir=runs/toy/policy --against=sft --judge=runs/other   win rate, by another reward
  perl_jax report   runs/toy/sft runs/toy/reward runs/toy/policy one HTML page of curves, answers and settings
  perl_jax sweep    --gin_file=sweeps/toy.gin --gin.SWEEP_DIR="'runs/sweep'"   a grid of runs, tables, plots
  perl_jax average  --model_dirs=runs/a,runs/b --model_dir=runs/ab   one reward of several (WARM)
  perl_jax plan     --gin_file=recipes/toy_policy.gin --topology=v5e:4x4   what a TPU would take, without one
  perl_jax inspect  --task=toy_pairs                             a task's examples and lengths
  perl_jax export   --model_dir=runs/toy/policy --format=hf --output=out    for transformers; or peft, or t5x
  perl_jax import   --format=peft --input=DIR --model_dir=runs/theirs --gin_file=models/llama3_2_1b.gin

sft, reward and policy take T5X's flags, as does eval on top of a run's own config.gin:
  --gin_file=FILE          a gin file; repeatable, later ones override (add tuning/full.gin for full tuning)
  --gin.NAME=VALUE         one binding or macro; strings need inner quotes: --gin.MODEL_DIR="'runs/x'"
  --gin_bindings='A = 1'   the same in gin's own words; repeatable
  --gin_search_paths=A,B   where gin files are looked for, before the package's own gin/
  --seqio_additional_cache_dirs=A,B   caches that SeqIO wrote (with --gin.USE_CACHED_TASKS=True)
  --tfds_data_dir=DIR      where TFDS has its data sets
  --distributed            one process of several, on a TPU pod or under Slurm; launch/ starts them. By hand:
                           --coordinator_address=HOST:PORT --process_count=N --process_index=I
The same command again goes on where the run was. Recipes lie in perl_jax/gin/recipes; start by reading one.
"""

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
CHATS = ('chatml', 'llama3', 'gemma', 'own')  # vocabulary.py
FORMATS = ('hf', 'peft', 't5x')  # exchange.py; GGUF is only read


def cli(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done.   2: an error that the user can mend, said in one line.   75: preempted, saved; to be run again.
    130: interrupted.   141: who read the output closed it.   1: a fault of the program, or a connection that broke.
    76, of one process among several: another was lost, or did not come.
    """
    program, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(HELP, end='')
        return 0
    if argv[0] == '--version':
        print(f'perl_jax {__version__}')
        return 0
    if program:
        startup.begin()
        survivor.begin(argv)
        if not survivor.is_one_of_several(argv):  # hosts of a pod should not load what others compile
            startup.keep_compiled()
    startup.quiet()
    with configure.released():
        return _command(argv)


def _command(argv: list[str]) -> int:
    try:
        command, rest = argv[0], argv[1:]
        if command not in _COMMANDS:
            raise UserError(f"no command is called '{command}'; there are {', '.join(_COMMANDS)} (perl_jax --help)")
        _COMMANDS[command](rest)
        return 0
    except UserError as error:  # gin and TensorFlow write around it where it passed
        code, said = 2, _line(error)
    except Preempted as error:
        said = str(error).partition('\n')[0]
        code, said = PREEMPTED, f'preempted; {said}; the same command goes on'
    except Lost as error:
        code, said = survivor.LOST, str(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:  # a full disk, a folder that is not ours
        code = 1 if isinstance(error, ConnectionError | TimeoutError) else 2  # 2 is never tried again on a pod
        said = f'{command}: ' + str(error).partition('\n')[0]
    except KeyboardInterrupt:
        code, said = 130, 'interrupted; the same command goes on from the last checkpoint'
    except Exception as error:
        if type(error).__module__.startswith('tensorflow') and 'UserError: ' in str(error):  # from inside a tf.data map
            return _leave(2, _line(error))
        if why := startup.no_devices():
            return _leave(2, why)
        if not _is_one_of_several():
            raise
        from perl_jax.parallel import distributed

        code, said = distributed.verdict(error)
    return _leave(code, said)


def _line(error: Exception) -> str:
    return str(error).rpartition('UserError: ')[2].strip().partition('\n')[0]


def _leave(code: int, said: str) -> int:
    """Say why, and give the exit code. One process of several goes at once: the others could wait for it for ever."""
    if not _is_one_of_several():
        print(f'perl_jax: {said}', file=sys.stderr)
        return code
    from perl_jax.parallel import distributed

    print(f'perl_jax: {distributed.whoami()}: {said}', file=sys.stderr, flush=True)
    if code != PREEMPTED:  # all are preempted together, and part in order
        os._exit(code)
    return code


def _is_one_of_several() -> bool:
    return 'jax' in sys.modules and sys.modules['jax'].distributed.is_initialized()


def _join(command: str, argv: list[str]) -> list[str]:
    """The arguments without those that make this process one of several, after they have."""
    if not survivor.is_one_of_several(argv):
        return argv
    from perl_jax.parallel import distributed

    parser = configure.Parser(prog=f'perl_jax {command}', add_help=False)
    for name, settings in distributed.FLAGS.items():
        parser.add_argument(name, **settings)
    known, rest = parser.parse_known_args(argv)
    distributed.join(**vars(known))
    return rest


def _run(command: str, argv: list[str]) -> None:
    files, bindings, paths, rest = configure.flags(command, _join(command, argv))
    if rest[:1] in (['-h'], ['--help']):
        print(HELP, end='')
        return
    if rest:
        raise UserError(f"{command}: unknown argument '{rest[0]}' (perl_jax --help; {t5x_names.PAGE})")
    if not files:
        raise UserError(f'{command}: give a recipe, such as --gin_file=recipes/toy_{command}.gin')
    configure.configured(f'train_{command}.train', files, bindings, paths)()


def _evaluate(argv: list[str]) -> None:
    options = [
        ('--split', {'default': 'validation', 'help': 'which split to measure'}),
        ('--group', {'help': 'a field of the examples: its rows are drawn together for the intervals (group)'}),
        ('--by', {'help': 'a field of the examples: rows of each value are measured apart, too (nearness)'}),
    ]
    _with_model_dir('eval', argv, options)


def _sample(argv: list[str]) -> None:
    options = [
        ('--prompt', {'help': "answer this text; without it, some of the task's prompts"}),
        ('--num', {'type': int, 'default': 5, 'help': 'how many prompts'}),
        ('--chat', {'choices': CHATS, 'help': "the chat format to put --prompt into; own: the model's own template"}),
    ]
    _with_model_dir('sample', argv, options)


def _with_model_dir(command: str, argv: list[str], options: list[tuple[str, dict[str, Any]]]) -> None:
    """eval, sample and export: the run's own config.gin, then the user's bindings on top."""
    from perl_jax.runs import rundir

    files, bindings, paths, rest = configure.flags(command, _join(command, argv))
    parser = configure.Parser(prog=f'perl_jax {command}')
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
    ours, name = _asking(about), f'infer.{command}_{kind}'
    if command == 'export':
        ours, name = 'runs/export.gin', 'exchange.export_run'
    files = ['runs/infer.gin', os.path.join(args['model_dir'], 'config.gin'), ours, *files]
    given = {key: value for key, value in args.items() if value is not None}  # what is left out, gin may bind
    configure.configured(name, files, bindings, paths)(**given)


def _asking(about: dict[str, Any]) -> str:
    from perl_jax.runs import rundir

    return f'runs/infer_{"imported" if rundir.is_imported(about) else about["phase"]}.gin'


def _export(argv: list[str]) -> None:
    options = [
        ('--format', {'required': True, 'choices': FORMATS}),
        ('--output', {'required': True, 'help': 'the folder to write'}),
        ('--dtype', {'default': 'float32', 'choices': ('float32', 'bfloat16', 'float16'), 'help': 'of merged weights'}),
        ('--base', {'dest': 'onto', 'help': 'of peft: the weights it is for: a Hugging Face folder, hf://NAME'}),
        ('--rank', {'type': int, 'help': 'of peft: cut the adapter to this rank; without it, it is exact'}),
    ]
    _with_model_dir('export', argv, options)


def _import(argv: list[str]) -> None:
    from perl_jax.interop import peft

    files, bindings, paths, rest = configure.flags('import', argv)
    parser = configure.Parser(prog='perl_jax import')
    parser.add_argument('--format', required=True, choices=(*FORMATS, 'gguf'))
    parser.add_argument('--input', required=True, help="a checkpoint's or adapter's folder; hf://OWNER/NAME, gs://...")
    parser.add_argument('--model_dir', required=True, help='the MODEL_DIR to make')
    args = vars(parser.parse_args(rest))
    # Where models/from_hf.gin looks; what the user binds comes later and counts.
    weights = [] if args['format'] == 'peft' else [f'INITIAL_CHECKPOINT_PATH = {_from_anywhere(args["input"])!r}']
    if args['format'] == 'peft' and not any('INITIAL_CHECKPOINT_PATH' in binding for binding in bindings):
        weights = [f'INITIAL_CHECKPOINT_PATH = {peft.base_of(args["input"])!r}']
    run = configure.configured('exchange.import_run', ['runs/import.gin', *files], [*weights, *bindings], paths)
    run(**args, config_text=configure.text())


def _from_anywhere(path: str) -> str:
    """A path that means the same in another folder."""
    return path if '://' in path or path.startswith('package:') else os.path.abspath(os.path.expanduser(path))


def _judge(argv: list[str]) -> None:
    from perl_jax.evals.judging import cautions, flags, judge
    from perl_jax.runs import rundir

    files, bindings, paths, rest = configure.flags('judge', argv)
    parser = configure.Parser(prog='perl_jax judge')
    for name, settings in flags.FLAGS.items():
        parser.add_argument(name, **settings)
    args = vars(parser.parse_args(rest))

    def of_run(model_dir: str, name: str) -> Callable[..., Any]:
        """A function under the configuration of one of the runs; the user's bindings are for those that answer."""
        own = (files, bindings) if name == 'infer.answer_split' else ([], [])
        if name == cautions.REWARD:
            return lambda: configure.binding(name, [os.path.join(model_dir, 'config.gin')], paths)
        config = ['runs/infer.gin', os.path.join(model_dir, 'config.gin'), _asking(rundir.about(model_dir)), *own[0]]
        # To be called before the next one is made: gin holds one configuration at a time.
        return configure.configured(name, config, own[1], paths)

    judge.run(of_run, **args)


def _report(argv: list[str]) -> None:
    from perl_jax.tools import report

    parser = configure.Parser(prog='perl_jax report')
    parser.add_argument('runs', nargs='+', metavar='MODEL_DIR', help='one run, or several to compare')
    parser.add_argument('--output', help='the page; default: report.html beside the runs')
    args = parser.parse_args(argv)
    print(report.write(args.runs, args.output))


def _average(argv: list[str]) -> None:
    from perl_jax.tools import average

    parser = configure.Parser(prog='perl_jax average')
    parser.add_argument('--model_dirs', required=True, help='runs of one phase on one base, with commas between them')
    parser.add_argument('--model_dir', required=True, help='the MODEL_DIR to make')
    parser.add_argument('--rank', type=int, help='cut the average to this rank; without it, it is exact')
    args = vars(parser.parse_args(argv))
    average.run(args.pop('model_dirs').split(','), **args)


def _sweep(argv: list[str]) -> None:
    data, argv = configure.data_flags('sweep', argv)
    files, bindings, paths, rest = configure.flags('sweep', argv)
    parser = configure.Parser(prog='perl_jax sweep')
    parser.add_argument('--dry_run', action='store_true', help='print the commands and do nothing')
    parser.add_argument('--jobs', type=int, help="how many cells at a time, in place of the grid's JOBS")
    args = vars(parser.parse_args(rest))
    if not files:
        raise UserError('sweep: give a grid, such as --gin_file=sweeps/toy.gin')
    if args['jobs'] is None:
        del args['jobs']
    configure.configured('sweep.run', files, bindings, paths)(**args, search_paths=paths, data_flags=data)


def _plan(argv: list[str]) -> None:
    files, bindings, paths, rest = configure.flags('plan', argv)
    parser = configure.Parser(prog='perl_jax plan')
    parser.add_argument('--topology', help="such as v5e:4x4, or 2xv5e:4x4 of two slices; default: the mesh file's")
    parser.add_argument('--topologies', help='several, with commas between them')
    parser.add_argument('--compare', help='tuning/NAME.gin to stand beside the run: full, lora_unshared')
    parser.add_argument('--fit', choices=['batch'], help='search the largest batch that fits')
    parser.add_argument('--json', action='store_true', help='print JSON')
    args = parser.parse_args(rest)
    if not files:
        raise UserError('plan: give a recipe, such as --gin_file=recipes/toy_policy.gin')
    from perl_jax.tools import plan

    phase = configure.phase(files, paths)

    def make(extra: list[str]) -> Callable[..., Any]:
        return configure.configured(f'programs.{phase}', [*files, *extra, f'runs/plan_{phase}.gin'], bindings, paths)

    variants = {'': []} | ({args.compare: [f'tuning/{args.compare}.gin']} if args.compare else {})
    for extra in variants.values():  # all is read before the first is compiled
        make(extra)
    makes = ((name or 'as configured', make(extra)) for name, extra in variants.items())
    topologies = (args.topologies or args.topology or '').split(',')
    plan.run(makes, [name or None for name in topologies], args.fit, args.json)


def _inspect(argv: list[str]) -> None:
    configure.load_tensorflow()
    from perl_jax.tools import inspect_task

    parser = configure.Parser(prog='perl_jax inspect')
    parser.add_argument('--task', required=True, help='a registered SeqIO task or mixture')
    parser.add_argument('--module', action='append', default=[], help='import this first (your own tasks); repeatable')
    parser.add_argument('--split', default='train')
    parser.add_argument('--num', type=int, default=3, help='how many examples to show')
    parser.add_argument(
        '--vocabulary', help="what to count with, not the task's own: a tokenizer, a model's folder, .gguf, a MODEL_DIR"
    )
    _, argv = configure.data_flags('inspect', argv)
    inspect_task.show(**vars(parser.parse_args(argv)))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{command: functools.partial(_run, command) for command in ('sft', 'reward', 'policy')},
    'eval': _evaluate,
    'sample': _sample,
    'judge': _judge,
    'report': _report,
    'sweep': _sweep,
    'average': _average,
    'plan': _plan,
    'inspect': _inspect,
    'export': _export,
    'import': _import,
}
