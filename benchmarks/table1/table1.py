"""The HBM rows of the paper's Table 1, and what each design choice contributes, by compiling for a TPU.

    python benchmarks/table1/table1.py            every plan that is not in docs/results/table1.json yet, then the page
    python benchmarks/table1/table1.py --only=8B  those whose name begins so

Compiling takes half a minute to two minutes a program on two cores.
Each plan is kept as soon as it is made; delete its entry, or the file, to make it again. Needs libtpu (the extra
`plan`), and no TPU.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from unittest import mock

from perl_jax.cli import configure
from perl_jax.models import logprobs
from perl_jax.runs import rundir
from perl_jax.tools import plan
from perl_jax.tools.plan import table

HERE = pathlib.Path(__file__).parent
DOCS = HERE.parents[1] / 'docs'
STORE = DOCS / 'results/table1.json'
BF16 = "{0}.dtype = 'bfloat16'", "{0}.remat = 'full'"
TOPOLOGY = "partitioning.Partitioner.topology = '{}'"
# Keys and values of 1,024 encoded tokens in 24 layers are 192 MiB a prompt: 1.5 GiB a chip for all at once.
HALVES = 'sampling.SamplingConfig.num_microbatches = 2'
# By default on v5e:4x4 (run.gin). Full tuning of 8B needs a little more than the 15.75 GiB of those chips.
MODELS = {
    '8B': ('models/llama3_1_8b.gin', [x.format('decoder.DecoderConfig') for x in BF16] + [TOPOLOGY.format('v6e:4x4')]),
    '2B': ('models/gemma2_2b.gin', [x.format('decoder.DecoderConfig') for x in BF16]),
    'T5 XL': ('models/t5_1_1_xl.gin', [x.format('t5.T5Config') for x in BF16] + [HALVES]),
}
TUNINGS = {'LoRA': [], 'unshared': ['tuning/lora_unshared.gin'], 'full': ['tuning/full.gin']}
# As the paper's loops were: every copy, frozen or not, in float32. It takes chips with more memory, as many of them.
FLOAT32 = ["BASE_DTYPE = 'float32'", TOPOLOGY.format('v5p:2x2x4')]
# What is taken away from PERL as it is, one at a time: (phase, bindings).
WITHOUT = {
    'a bfloat16 base (float32)': ('reward', ["BASE_DTYPE = 'float32'"]),
    'remat (everything kept)': ('reward', ["decoder.DecoderConfig.remat = 'none'"]),
    'remat of all (matmul outputs kept)': ('reward', ["decoder.DecoderConfig.remat = 'minimal'"]),
    'one prompt for both responses': ('reward', ["MIXTURE_OR_TASK_NAME = 'toy_thumbs'", 'BATCH_SIZE = 256']),
    'microbatches (all 128 at once)': ('reward', ['NUM_MICROBATCHES = 1']),
}
AT_ONCE = '8B, logits at once'
PAPER = {'reward': '43-56%', 'policy': '74-80%'}


def made(phase: str, files: list[str], bindings: list[str], tuning: str) -> dict:
    """One plan, as `perl_jax plan --json` has it."""
    files = [*files[:1], f'{phase}.gin', *files[1:], f'runs/plan_{phase}.gin']
    make = configure.configured(f'programs.{phase}', files, bindings, [str(HERE)])
    return table.summary(tuning, *plan.compiled(make, None))


def wanted() -> dict[str, tuple]:
    """Every plan by its name."""
    plans = {}
    for model, (file, bindings) in MODELS.items():
        for phase in ('reward', 'policy'):
            for tuning, extra in TUNINGS.items():
                if (phase, tuning) != ('reward', 'unshared'):
                    plans[f'{model}, {phase}, {tuning}'] = (phase, [file, *extra], bindings, tuning)
    file, bindings = MODELS['8B']
    for tuning in ('unshared', 'full'):
        extra = TUNINGS[tuning]
        plans[f'8B, policy, {tuning} in float32'] = ('policy', [file, *extra], [*bindings, *FLOAT32], tuning)
    for what, (phase, more) in WITHOUT.items():
        plans[f'8B, without {what}'] = (phase, [file], [*bindings, *more], 'LoRA')
    plans[AT_ONCE] = ('policy', [file], bindings, 'LoRA')
    return plans


def page(plans: dict) -> str:
    """The tables, as Markdown."""
    gib = lambda n: f'{n / 2**30:.2f}'  # noqa: E731
    lines = [
        '| model | phase | full, GiB a chip | LoRA, GiB | % of full | unshared copies, GiB | % of full | the paper |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for model in MODELS:
        for phase in ('reward', 'policy'):
            lora, copies, full = (plans.get(f'{model}, {phase}, {tuning}') for tuning in TUNINGS)
            if not (lora and full):
                continue
            cells = [gib(full['peak']), gib(lora['peak']), f'**{lora["peak"] / full["peak"]:.0%}**']
            own = [gib(copies['peak']), f'{copies["peak"] / full["peak"]:.0%}'] if copies else ['', '']
            name = 'reward' if phase == 'reward' else 'RL loop'
            lines.append('| ' + ' | '.join([model, name, *cells, *own, PAPER[phase]]) + ' |')
    copies, full = (plans.get(f'8B, policy, {tuning} in float32') for tuning in ('unshared', 'full'))
    if copies and full:
        cells = gib(full['peak']), '', '', gib(copies['peak']), f'**{copies["peak"] / full["peak"]:.0%}**'
        lines.append('| ' + ' | '.join(['8B', 'RL loop, all float32', *cells, PAPER['policy']]) + ' |')
    head = '| model | program | full: base, learned, optimizer, added | LoRA | s, full | s, LoRA |'
    lines += ['', head, '|' + '---|' * 6]
    parts = lambda one: ', '.join(gib(one[p]) for p in ('base', 'adapters', 'optimizer', 'temporaries'))  # noqa: E731
    for model in MODELS:
        for phase in ('reward', 'policy'):
            lora, full = (plans.get(f'{model}, {phase}, {tuning}') for tuning in ('LoRA', 'full'))
            for mine, theirs in zip(*(x['programs'] for x in (lora, full))) if lora and full else ():
                row = [model, mine['name'], parts(theirs), parts(mine)]
                lines.append('| ' + ' | '.join([*row, *(f'{x["seconds"]:.2f}' for x in (theirs, mine))]) + ' |')
    if reference := plans.get('8B, reward, LoRA'):
        lines += ['', '| 8B reward, PERL | GiB a chip | s a step |', '|---|---|---|']
        lines.append(f'| as it is | {gib(reference["peak"])} | {reference["seconds"]:.2f} |')
        for name in WITHOUT:
            if one := plans.get(f'8B, without {name}'):
                took = f'{one["seconds"]:.2f}' if one['seconds'] else ''
                peak = gib(one['peak']) if one['peak'] else 'does not fit: needs ' + one['programs'][0]['needs']
                lines.append(f'| without {name} | {peak} | {took} |')
    if AT_ONCE in plans:
        lines += ['', '| 8B RL loop, PERL | experience: GiB a chip, s | policy step: GiB a chip, s |', '|---|---|---|']
        rows = {'as it is': '8B, policy, LoRA', 'without chunks of logits (all positions at once)': AT_ONCE}
        for what, name in rows.items():
            of = {one['name']: f'{gib(one["peak"])}, {one["seconds"]:.2f}' for one in plans[name]['programs']}
            lines.append(f'| {what} | {of["experience"]} | {of["policy step"]} |')
    return '\n'.join(lines)


def plot(plans: dict, path: pathlib.Path) -> None:
    """Bars: what lies on a chip at each phase's peak."""
    from matplotlib import pyplot as plt

    parts = dict(zip(table.PARTS, ('#9aa5b1', '#2f6f9f', '#e0a030', '#777777', '#c0504d')))
    names = [n for n in plans if 'without' not in n and n != AT_ONCE]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(names) + 1.2), layout='constrained')
    for y, name in enumerate(names):
        top, left = max(plans[name]['programs'], key=lambda one: one['peak'] or 0), 0.0
        for part, color in parts.items():
            width = (top[part] or 0) / 2**30
            axis.barh(y, width, left=left, color=color, label=part if y == 0 else None)
            left += width
        said = f'{left:.2f}  ({top["name"]})'
        axis.annotate(said, (left, y), (3, 0), textcoords='offset points', va='center', fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * axis.get_xlim()[1])
    axis.set_xlabel('GiB a chip at the peak')
    axis.legend(loc='upper right', fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--only', default='', help='plans whose name begins so')
    only = parser.parse_args().only
    plans = json.loads(STORE.read_text()) if STORE.exists() else {}
    for name, settings in wanted().items():
        if name.startswith(only) and name not in plans:
            print(name, flush=True)
            with mock.patch.object(logprobs, 'MAX_LOGITS', 2**40 if name == AT_ONCE else logprobs.MAX_LOGITS):
                plans[name] = made(*settings)
            rundir.replace(str(STORE), json.dumps(plans, indent=1) + '\n')
    plans = {name: plans[name] for name in wanted() if name in plans}
    doc = DOCS / 'tpu.md'
    if doc.exists():
        place = re.compile('(<!-- table1 -->\n).*?(\n<!-- end -->)', re.DOTALL)
        doc.write_text(place.sub(lambda m: m[1] + page(plans) + m[2], doc.read_text()))
    plot(plans, DOCS / 'table1.png')
    print(page(plans))


if __name__ == '__main__':
    main()
