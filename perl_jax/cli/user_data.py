"""`perl_jax inspect` and `perl_jax init`: a user's rows before anything trains, and recipes for them."""

from __future__ import annotations

from perl_jax.cli import data_flags
from perl_jax.cli.parser import Parser
from perl_jax.settings import Natural, flag


def inspect(argv: list[str]) -> None:
    """Run `perl_jax inspect`."""
    data_flags.load_tensorflow()
    from perl_jax.tools import inspect_files, inspect_task

    parser = Parser(prog='perl_jax inspect')
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument('--task', help='a registered SeqIO task or mixture')
    rows.add_argument('--data', help=data_flags.DATA)
    parser.add_argument('--module', action='append', default=[], help='a module with your tasks to import; repeatable')
    parser.add_argument('--split', default='train')
    parser.add_argument('--num', type=flag(Natural), default=3, help='how many examples to show')
    parser.add_argument(
        '--vocabulary', '--model', help='another tokenizer: its file, a model folder, a .gguf or a MODEL_DIR'
    )
    parser.add_argument('--columns', help=f'of --data: {data_flags.COLUMNS}')
    parser.add_argument('--kind', choices=inspect_files.KINDS, help='of --data: what to show the rows as')
    _, argv = data_flags.parse_locations('inspect', argv)
    args = vars(parser.parse_args(argv))
    data, columns, kind = args.pop('data'), args.pop('columns'), args.pop('kind')
    if data is not None:
        paths, columns = data_flags.places(data), data_flags.columns(columns)
        args['task'] = inspect_files.show(paths, columns, kind, args['vocabulary'])
    elif columns or kind:
        parser.error('--columns and --kind are for --data; a --task has its own')
    inspect_task.show(**args)


def init(argv: list[str]) -> None:
    """Run `perl_jax init`."""
    data_flags.load_tensorflow()
    from perl_jax.tools import initial_recipes

    parser = Parser(prog='perl_jax init')
    parser.add_argument('folder', metavar='DIR', help='where to write sft.gin, reward.gin and policy.gin')
    parser.add_argument('--model', required=True, help=data_flags.MODEL)
    parser.add_argument('--data', required=True, help=data_flags.DATA)
    parser.add_argument('--columns', help=data_flags.COLUMNS)
    args = parser.parse_args(argv)
    paths, columns = data_flags.places(args.data), data_flags.columns(args.columns)
    folder, model = data_flags.absolute(args.folder), data_flags.absolute(args.model)
    print(initial_recipes.write(folder, model, paths, columns))
