"""The command line: T5X's gin flags, one command per phase."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from perl_jax import __version__
from perl_jax.cli import configure, data_flags, exits, t5x_names, user_data
from perl_jax.cli.parser import nearest
from perl_jax.errors import UserError
from perl_jax.parallel import startup, survivor
from perl_jax.settings import Count, flag

COUNT = flag(Count)

HELP = """\
PERL (arXiv 2403.10704) in JAX: reward models and RL policies trained with LoRA on one frozen base.

  perl_jax demo                                                  all of it on a toy task, in minutes
  perl_jax sft      --gin_file=recipes/toy_sft.gin    --gin.MODEL_DIR="'runs/toy/sft'"
  perl_jax reward   --gin_file=recipes/toy_reward.gin --gin.MODEL_DIR="'runs/toy/reward'" \\
                    --gin.INITIAL_CHECKPOINT_PATH="'runs/toy/sft'"
  perl_jax policy   --gin_file=recipes/toy_policy.gin --gin.MODEL_DIR="'runs/toy/policy'" \\
                    --gin.INITIAL_CHECKPOINT_PATH="'runs/toy/sft'" --gin.REWARD_MODEL_DIR="'runs/toy/reward'"
  perl_jax eval     --model_dir=runs/toy/policy --split=test     evaluate a finished run
  perl_jax sample   --model_dir=runs/toy/policy                  read some answers
  perl_jax judge    --model_dir=runs/toy/policy --against=sft --judge=runs/other   win rate, by another reward
  perl_jax report   runs/toy/sft runs/toy/reward runs/toy/policy one HTML page of curves, answers and settings
  perl_jax sweep    --gin_file=sweeps/toy.gin --gin.SWEEP_DIR="'runs/sweep'"   a grid of runs, tables, plots
  perl_jax average  --model_dirs=runs/a,runs/b --model_dir=runs/ab   one reward of several (WARM)
  perl_jax plan     --gin_file=recipes/toy_policy.gin --topology=v5e:4x4   memory and time on a TPU
  perl_jax inspect  --data=rows.jsonl                            how your rows are read; or --task=toy_pairs
  perl_jax init     mine --model=hf://OWNER/NAME --data=rows.jsonl   recipes for your model and rows
  perl_jax list     recipes                                      or models, tuning, mesh, tasks, settings ..
  perl_jax show     recipes/toy_sft.gin                          a gin file with all that it includes
  perl_jax copy     recipes/toy_sft.gin mine.gin                 a recipe to edit, for --gin_file
  perl_jax export   --model_dir=runs/toy/policy --format=hf --output=out    for transformers; or peft, or t5x
  perl_jax import   --format=peft --input=DIR --model_dir=runs/theirs --gin_file=models/llama3_2_1b.gin

sft, reward and policy take --data=ROWS and --model=WEIGHTS, with or without a recipe, and T5X's flags; eval
takes the latter on top of a run's own config.gin:
  --gin_file=FILE          a gin file; repeatable, later ones override (add tuning/full.gin for full tuning)
  --gin.NAME=VALUE         one binding or macro; strings need inner quotes: --gin.MODEL_DIR="'runs/x'"
  --gin_bindings='A = 1'   the same in gin's syntax; repeatable
  --gin_search_paths=A,B   folders to search for gin files, before the package's gin/
  --seqio_additional_cache_dirs=A,B   caches that SeqIO wrote (with --gin.USE_CACHED_TASKS=True)
  --tfds_data_dir=DIR      the folder of TFDS's datasets
  --distributed            one process of several, on a TPU pod or under Slurm; launch/ starts them. By hand:
                           --coordinator_address=HOST:PORT --process_count=N --process_index=I
Rerun the same command to resume a run. Recipes are in perl_jax/gin/recipes; start by reading one.
"""

CHATS = ('chatml', 'llama3', 'gemma', 'own')  # vocabulary.py
FORMATS = ('hf', 'peft', 't5x')  # exchange.py; GGUF can only be imported


def cli(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code (exits.py); `argv` None is the command line of this process."""
    is_main_program, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help', 'help'):
        print(HELP, end='')
        return 0
    if argv[0] == '--version':
        print(f'perl_jax {__version__}')
        return 0
    if is_main_program:
        startup.begin()
        survivor.begin(argv)
        if not survivor.is_one_of_several(argv):  # hosts of a pod must not load programs that others compiled
            startup.use_compilation_cache()
    startup.configure_logging()
    with configure.restored_state():
        code = exits.run(_dispatch, argv[0], argv, is_main_program=is_main_program)
    return exits.leave(code) if is_main_program else code


def _dispatch(argv: Sequence[str]) -> None:
    command, *arguments = argv
    if command not in _COMMANDS:
        names = f'there are {", ".join(_COMMANDS)}'
        raise UserError(f"no command is called '{command}'{nearest(command, _COMMANDS)}; {names} (perl_jax --help)")
    _COMMANDS[command](arguments)


def _join(command: str, argv: list[str]) -> list[str]:
    """Join a job of several processes, if the flags specify one; returns the remaining arguments."""
    if not survivor.is_one_of_several(argv):
        return argv
    from perl_jax.parallel import distributed

    parser = configure.Parser(prog=f'perl_jax {command}', add_help=False)
    for name, settings in distributed.FLAGS.items():
        parser.add_argument(name, **settings)
    parsed, remaining = parser.parse_known_args(argv)
    distributed.join(**vars(parsed))
    return remaining


def _run(command: str, argv: list[str]) -> None:
    files, bindings, paths, flags_left = configure.parse_flags(command, _join(command, argv))
    data_files, data_bindings, flags_left = data_flags.parse_rows(command, flags_left)
    if flags_left[:1] in (['-h'], ['--help']):
        from perl_jax.cli import catalog

        print(catalog.phase_help(command))
        return
    if flags_left:
        page = f'; {t5x_names.PAGE}' if t5x_names.is_flag(flags_left[0]) else ''
        names = nearest(flags_left[0], ('--gin_file', '--gin_bindings', '--gin_search_paths', *data_flags.NAMES))
        raise UserError(f"{command}: unknown argument '{flags_left[0]}'{names} (perl_jax {command} --help{page})")
    if not files and not data_files:
        raise UserError(
            f'{command}: give a recipe, such as --gin_file=recipes/toy_{command}.gin; `perl_jax init` writes one for '
            'your model and data'
        )
    if data_files:  # a recipe may be left out, and includes this file
        files = [f'runs/{command}.gin', *files, *data_files]
    configure.configured(f'train_{command}.train', files, [*data_bindings, *bindings], paths)()


def _evaluate(argv: list[str]) -> None:
    options = [
        ('--split', {'default': 'validation', 'help': 'the split to evaluate'}),
        ('--group', {'help': 'the field by which examples are grouped in the bootstrap; default: group'}),
        ('--by', {'help': 'the field whose values are also measured separately; default: nearness'}),
    ]
    _with_model_dir('eval', argv, options)


def _sample(argv: list[str]) -> None:
    options = [
        ('--prompt', {'help': "answer this text; without it, some of the task's prompts"}),
        ('--num', {'type': COUNT, 'default': 5, 'help': 'how many prompts'}),
        ('--chat', {'choices': CHATS, 'help': "the chat format to put --prompt into; own: the model's own template"}),
    ]
    _with_model_dir('sample', argv, options)


def _with_model_dir(command: str, argv: list[str], options: list[tuple[str, dict[str, Any]]]) -> None:
    """Run eval, sample or export with the run's config.gin, overridden by the user's bindings."""
    from perl_jax.runs import rundir

    files, bindings, paths, flags_left = configure.parse_flags(command, _join(command, argv))
    parser = configure.Parser(prog=f'perl_jax {command}')
    parser.add_argument('--model_dir', required=True, help='MODEL_DIR of a run')
    for name, settings in options:
        parser.add_argument(name, **settings)
    args = vars(parser.parse_args(flags_left))
    about = rundir.read(args['model_dir'])
    if about is None:
        raise UserError(f"{command}: '{args['model_dir']}' is not the MODEL_DIR of a run: it has no run.json")
    role = 'reward' if about['phase'] == 'reward' else 'policy'
    if (command, role) == ('sample', 'reward'):
        raise UserError(f"sample: '{args['model_dir']}' is a run of reward, which gives no answers; give a policy's")
    command_file, name = _infer_file(about), f'infer.{command}_{role}'
    if command == 'export':
        command_file, name = 'runs/export.gin', 'exchange.export_run'
    files = ['runs/infer.gin', os.path.join(args['model_dir'], 'config.gin'), command_file, *files]
    set_arguments = {key: value for key, value in args.items() if value is not None}  # gin may bind the others
    configure.configured(name, files, bindings, paths)(**set_arguments)


def _infer_file(about: dict[str, Any]) -> str:
    from perl_jax.runs import rundir

    return f'runs/infer_{"imported" if rundir.is_imported(about) else about["phase"]}.gin'


def _export(argv: list[str]) -> None:
    options = [
        ('--format', {'required': True, 'choices': FORMATS}),
        ('--output', {'required': True, 'help': 'the folder to write'}),
        ('--dtype', {'default': 'float32', 'choices': ('float32', 'bfloat16', 'float16'), 'help': 'of merged weights'}),
        ('--base', {'dest': 'onto', 'help': 'for peft, the weights it applies to: a Hugging Face folder, hf://NAME'}),
        ('--rank', {'type': COUNT, 'help': 'for peft, truncate the adapter to this rank; default: exact'}),
    ]
    _with_model_dir('export', argv, options)


def _import(argv: list[str]) -> None:
    from perl_jax.interop import peft

    files, bindings, paths, flags_left = configure.parse_flags('import', argv)
    parser = configure.Parser(prog='perl_jax import')
    parser.add_argument('--format', required=True, choices=(*FORMATS, 'gguf'))
    parser.add_argument('--input', required=True, help="a checkpoint's or adapter's folder; hf://OWNER/NAME, gs://...")
    parser.add_argument('--model_dir', required=True, help='the MODEL_DIR to make')
    args = vars(parser.parse_args(flags_left))
    # models/from_hf.gin reads this macro; the user's bindings come later and override it.
    defaults = [] if args['format'] == 'peft' else [f'INITIAL_CHECKPOINT_PATH = {data_flags.absolute(args["input"])!r}']
    if args['format'] == 'peft' and not any('INITIAL_CHECKPOINT_PATH' in binding for binding in bindings):
        defaults = [f'INITIAL_CHECKPOINT_PATH = {peft.base_of(args["input"])!r}']
    import_run = configure.configured('exchange.import_run', ['runs/import.gin', *files], [*defaults, *bindings], paths)
    import_run(**args, config_text=configure.current_config_text())


def _judge(argv: list[str]) -> None:
    from perl_jax.evals.judging import cautions, flags, judge
    from perl_jax.runs import rundir

    files, bindings, paths, flags_left = configure.parse_flags('judge', argv)
    parser = configure.Parser(prog='perl_jax judge')
    for name, settings in flags.FLAGS.items():
        parser.add_argument(name, **settings)
    args = vars(parser.parse_args(flags_left))

    def run_function(model_dir: str, name: str) -> Callable[..., Any]:
        """Return a function configured by one of the runs; the user's bindings apply to answering runs only."""
        user_config = (files, bindings) if name == 'infer.answer_split' else ([], [])
        if name == cautions.REWARD:
            return lambda: configure.bindings(name, rundir.configs(model_dir), paths)
        config_gin, infer_gin = os.path.join(model_dir, 'config.gin'), _infer_file(rundir.require(model_dir))
        config_files = ['runs/infer.gin', config_gin, infer_gin, *user_config[0]]
        # It must be called before the next one is configured: gin has a single global configuration.
        return configure.configured(name, config_files, user_config[1], paths)

    judge.run(run_function, **args)


def _report(argv: list[str]) -> None:
    from perl_jax.tools import report

    parser = configure.Parser(prog='perl_jax report')
    parser.add_argument('runs', nargs='+', metavar='MODEL_DIR', help='one run, or several to compare')
    parser.add_argument('--output', help="the page's path; default: report.html beside the runs")
    args = parser.parse_args(argv)
    print(report.write(args.runs, args.output))


def _average(argv: list[str]) -> None:
    from perl_jax.tools import average

    parser = configure.Parser(prog='perl_jax average')
    parser.add_argument('--model_dirs', required=True, help='runs of one phase on one base, comma-separated')
    parser.add_argument('--model_dir', required=True, help='the MODEL_DIR to make')
    parser.add_argument('--rank', type=COUNT, help='truncate the average to this rank; default: exact')
    args = vars(parser.parse_args(argv))
    average.run(args.pop('model_dirs').split(','), **args)


def _sweep(argv: list[str]) -> None:
    location_flags, argv = data_flags.parse_locations('sweep', argv)
    files, bindings, paths, flags_left = configure.parse_flags('sweep', argv)
    parser = configure.Parser(prog='perl_jax sweep')
    parser.add_argument('--dry_run', action='store_true', help='print the commands and do nothing')
    parser.add_argument('--jobs', type=COUNT, help="the number of cells that run at a time; overrides the grid's JOBS")
    args = vars(parser.parse_args(flags_left))
    if not files:
        raise UserError('sweep: give a grid, such as --gin_file=sweeps/toy.gin')
    if args['jobs'] is None:
        del args['jobs']
    configure.configured('sweep.run', files, bindings, paths)(**args, search_paths=paths, data_flags=location_flags)


def _plan(argv: list[str]) -> None:
    files, bindings, paths, flags_left = configure.parse_flags('plan', argv)
    parser = configure.Parser(prog='perl_jax plan')
    parser.add_argument('--topology', help="such as v5e:4x4, or 2xv5e:4x4 of two slices; default: the mesh file's")
    parser.add_argument('--topologies', help='several, comma-separated')
    parser.add_argument('--compare', help='compare the run with tuning/NAME.gin: full, lora_unshared')
    parser.add_argument('--fit', choices=['batch'], help='search for the largest batch that fits')
    parser.add_argument('--json', action='store_true', help='print JSON')
    parser.add_argument('--model', help=f'{data_flags.MODEL}, whose network is planned')
    args = parser.parse_args(flags_left)
    if not files:
        raise UserError('plan: give a recipe, such as --gin_file=recipes/toy_policy.gin')
    from perl_jax.tools import plan

    phase = configure.phase(files, paths)
    model_files, model_bindings = data_flags.weights(args.model)

    def configure_planner(tuning_files: list[str]) -> Callable[..., Any]:
        return configure.planner(phase, [*files, *model_files, *tuning_files], [*model_bindings, *bindings], paths)

    tunings = {'': []} | ({args.compare: [f'tuning/{args.compare}.gin']} if args.compare else {})
    for tuning_files in tunings.values():  # fail on invalid settings before compiling anything
        configure_planner(tuning_files)
    planners = ((name or 'as configured', configure_planner(tuning_files)) for name, tuning_files in tunings.items())
    topologies = (args.topologies or args.topology or '').split(',')
    plan.run(planners, [name or None for name in topologies], args.fit, args.json)


def _demo(argv: list[str]) -> None:
    from perl_jax.tools import demo

    parser = configure.Parser(prog='perl_jax demo')
    parser.add_argument('--short', action='store_true', help='a few steps of each phase, as a smoke test')
    parser.add_argument('--output', help='the folder of the runs; default: runs/demo, or runs/demo_short')
    args = parser.parse_args(argv)
    demo.run(args.output or ('runs/demo_short' if args.short else 'runs/demo'), args.short)


def _list(argv: list[str]) -> None:
    from perl_jax.cli import catalog

    parser = configure.Parser(prog='perl_jax list')
    parser.add_argument('kind', choices=catalog.KINDS)
    kind = parser.parse_args(argv).kind
    if kind == 'tasks':
        data_flags.load_tensorflow()
    print('\n'.join(catalog.lines(kind)))


def _show(argv: list[str]) -> None:
    from perl_jax.cli import catalog

    parser = configure.Parser(prog='perl_jax show')
    parser.add_argument('name', help='a gin file of the package, such as recipes/toy_sft.gin')
    print(catalog.resolve(parser.parse_args(argv).name), end='')


def _copy(argv: list[str]) -> None:
    from perl_jax.cli import catalog

    parser = configure.Parser(prog='perl_jax copy')
    parser.add_argument('name', help='a gin file of the package, such as recipes/toy_sft.gin')
    parser.add_argument('output', help='the file to write, for --gin_file')
    print(catalog.copy(**vars(parser.parse_args(argv))))


_COMMANDS: dict[str, Callable[[list[str]], None]] = {
    **{command: functools.partial(_run, command) for command in ('sft', 'reward', 'policy')},
    'eval': _evaluate,
    'sample': _sample,
    'judge': _judge,
    'report': _report,
    'sweep': _sweep,
    'average': _average,
    'plan': _plan,
    'inspect': user_data.inspect,
    'init': user_data.init,
    'demo': _demo,
    'export': _export,
    'import': _import,
    'list': _list,
    'show': _show,
    'copy': _copy,
}
