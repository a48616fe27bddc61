"""The HBM rows of the paper's Table 1, and the effect of each design choice, by compiling for a TPU.

    python benchmarks/table1/table1.py            compiles the plans that docs/results/table1.json lacks, then the page
    python benchmarks/table1/table1.py --only=8B  only plans whose name starts with 8B

Compiling takes half a minute to two minutes a program on two cores. Each plan is saved when it is done; delete its
entry, or the file, to repeat it. Needs libtpu (the extra `plan`), but no TPU.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
from unittest import mock

from perl_jax.cli import configure
from perl_jax.models import logprobs
from perl_jax.runs import logs
from perl_jax.tools import plan
from perl_jax.tools.plan import table

HERE = pathlib.Path(__file__).parent
RESULTS = HERE.parents[1] / 'docs/results'
PAGE = HERE.parents[1] / 'docs/explanation/memory.md'
STORE, PLOT = RESULTS / 'table1.json', RESULTS / 'table1.png'
BF16 = "{0}.dtype = 'bfloat16'", "{0}.remat = 'full'"
TOPOLOGY = "partitioning.Partitioner.topology = '{}'"
# Keys and values of 1,024 encoded tokens in 24 layers are 192 MiB a prompt: 1.5 GiB a chip for all at once.
TWO_MICROBATCHES = 'sampling.SamplingConfig.num_microbatches = 2'
# By default on v5e:4x4 (run.gin). Full tuning of 8B needs a little more than the 15.75 GiB of those chips.
MODELS = {
    '8B': ('models/llama3_1_8b.gin', [x.format('decoder.DecoderConfig') for x in BF16] + [TOPOLOGY.format('v6e:4x4')]),
    '2B': ('models/gemma2_2b.gin', [x.format('decoder.DecoderConfig') for x in BF16]),
    'T5 XL': ('models/t5_1_1_xl.gin', [x.format('t5.T5Config') for x in BF16] + [TWO_MICROBATCHES]),
}
TUNINGS = {'LoRA': [], 'unshared': ['tuning/lora_unshared.gin'], 'full': ['tuning/full.gin']}
# As the paper's loops were: every copy, frozen or not, in float32. It takes chips with more memory, as many of them.
FLOAT32 = ["BASE_DTYPE = 'float32'", TOPOLOGY.format('v5p:2x2x4')]
# Ablations of PERL, one at a time: (phase, bindings).
ABLATIONS = {
    'a bfloat16 base (float32)': ('reward', ["BASE_DTYPE = 'float32'"]),
    'remat (everything kept)': ('reward', ["decoder.DecoderConfig.remat = 'none'"]),
    'remat of all (matmul outputs kept)': ('reward', ["decoder.DecoderConfig.remat = 'minimal'"]),
    'one prompt for both responses': ('reward', ["MIXTURE_OR_TASK_NAME = 'toy_thumbs'", 'BATCH_SIZE = 256']),
    'microbatches (all 128 at once)': ('reward', ['NUM_MICROBATCHES = 1']),
}
AT_ONCE = '8B, logits at once'
PAPER = {'reward': '43-56%', 'policy': '74-80%'}


def compile_plan(phase: str, files: list[str], bindings: list[str], tuning: str) -> dict:
    """Compile one plan; returns an entry of `perl_jax plan --json`."""
    planner = configure.planner(phase, [*files[:1], f'{phase}.gin', *files[1:]], bindings, [str(HERE)])
    return table.summary(tuning, *plan.compile_plan(planner, None))


def plan_settings() -> dict[str, tuple]:
    """Return the settings of every plan by its name."""
    plans = {}
    for model, (file, bindings) in MODELS.items():
        for phase in ('reward', 'policy'):
            for tuning, tuning_files in TUNINGS.items():
                if (phase, tuning) != ('reward', 'unshared'):
                    plans[f'{model}, {phase}, {tuning}'] = (phase, [file, *tuning_files], bindings, tuning)
    file, bindings = MODELS['8B']
    for tuning in ('unshared', 'full'):
        tuning_files = TUNINGS[tuning]
        plans[f'8B, policy, {tuning} in float32'] = ('policy', [file, *tuning_files], [*bindings, *FLOAT32], tuning)
    for ablation, (phase, extra_bindings) in ABLATIONS.items():
        plans[f'8B, without {ablation}'] = (phase, [file], [*bindings, *extra_bindings], 'LoRA')
    plans[AT_ONCE] = ('policy', [file], bindings, 'LoRA')
    return plans


def page(plans: dict) -> str:
    """Format the tables as Markdown."""
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
            copies_cells = [gib(copies['peak']), f'{copies["peak"] / full["peak"]:.0%}'] if copies else ['', '']
            name = 'reward' if phase == 'reward' else 'RL loop'
            lines.append('| ' + ' | '.join([model, name, *cells, *copies_cells, PAPER[phase]]) + ' |')
    copies, full = (plans.get(f'8B, policy, {tuning} in float32') for tuning in ('unshared', 'full'))
    if copies and full:
        cells = gib(full['peak']), '', '', gib(copies['peak']), f'**{copies["peak"] / full["peak"]:.0%}**'
        lines.append('| ' + ' | '.join(['8B', 'RL loop, all float32', *cells, PAPER['policy']]) + ' |')
    header = '| model | program | full: base, learned, optimizer, added | LoRA | s, full | s, LoRA |'
    lines += ['', header, '|' + '---|' * 6]
    components = lambda program: ', '.join(gib(program[p]) for p in ('base', 'adapters', 'optimizer', 'temporaries'))  # noqa: E731
    for model in MODELS:
        for phase in ('reward', 'policy'):
            lora, full = (plans.get(f'{model}, {phase}, {tuning}') for tuning in ('LoRA', 'full'))
            for lora_program, full_program in zip(*(x['programs'] for x in (lora, full))) if lora and full else ():
                row = [model, lora_program['name'], components(full_program), components(lora_program)]
                lines.append(
                    '| ' + ' | '.join([*row, *(f'{x["seconds"]:.2f}' for x in (full_program, lora_program))]) + ' |'
                )
    if reference := plans.get('8B, reward, LoRA'):
        lines += ['', '| 8B reward, PERL | GiB a chip | s a step |', '|---|---|---|']
        lines.append(f'| as it is | {gib(reference["peak"])} | {reference["seconds"]:.2f} |')
        for name in ABLATIONS:
            if program := plans.get(f'8B, without {name}'):
                seconds = f'{program["seconds"]:.2f}' if program['seconds'] else ''
                peak = (
                    gib(program['peak'])
                    if program['peak']
                    else 'does not fit: needs ' + program['programs'][0]['needs']
                )
                lines.append(f'| without {name} | {peak} | {seconds} |')
    if AT_ONCE in plans:
        lines += ['', '| 8B RL loop, PERL | experience: GiB a chip, s | policy step: GiB a chip, s |', '|---|---|---|']
        rows = {'as it is': '8B, policy, LoRA', 'without chunks of logits (all positions at once)': AT_ONCE}
        for row_name, name in rows.items():
            program_figures = {
                program['name']: f'{gib(program["peak"])}, {program["seconds"]:.2f}'
                for program in plans[name]['programs']
            }
            lines.append(f'| {row_name} | {program_figures["experience"]} | {program_figures["policy step"]} |')
    return '\n'.join(lines)


def plot(plans: dict, path: pathlib.Path) -> None:
    """Draw bars of the memory on a chip at each phase's peak, by component."""
    from matplotlib import pyplot as plt

    colors = dict(zip(table.COLUMNS, ('#9aa5b1', '#2f6f9f', '#e0a030', '#777777', '#c0504d')))
    names = [n for n in plans if 'without' not in n and n != AT_ONCE]
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(names) + 1.2), layout='constrained')
    for y, name in enumerate(names):
        largest_program, left = max(plans[name]['programs'], key=lambda program: program['peak'] or 0), 0.0
        for component, color in colors.items():
            width = (largest_program[component] or 0) / 2**30
            axis.barh(y, width, left=left, color=color, label=component if y == 0 else None)
            left += width
        annotation = f'{left:.2f}  ({largest_program["name"]})'
        axis.annotate(annotation, (left, y), (3, 0), textcoords='offset points', va='center', fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * axis.get_xlim()[1])
    axis.set_xlabel('GiB a chip at the peak')
    axis.legend(loc='upper right', fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--only', default='', help='only plans whose name starts with this')
    name_prefix = parser.parse_args().only
    plans = json.loads(STORE.read_text()) if STORE.exists() else {}
    for name, settings in plan_settings().items():
        if name.startswith(name_prefix) and name not in plans:
            print(name, flush=True)
            with mock.patch.object(logprobs, 'MAX_LOGITS', 2**40 if name == AT_ONCE else logprobs.MAX_LOGITS):
                plans[name] = compile_plan(*settings)
            logs.replace(str(STORE), json.dumps(plans, indent=1) + '\n')
    plans = {name: plans[name] for name in plan_settings() if name in plans}
    if PAGE.exists():
        place = re.compile('(<!-- table1 -->\n).*?(\n<!-- end -->)', re.DOTALL)
        PAGE.write_text(place.sub(lambda m: m[1] + page(plans) + m[2], PAGE.read_text()))
    plot(plans, PLOT)
    print(page(plans))


if __name__ == '__main__':
    main()
