"""Scaling of a step's time and memory: runs reward_step.py and policy_step.py at sizes around S, one axis at a time.

    python benchmarks/growth.py        measures what docs/results/growth.json lacks, then writes docs/results/growth.png

It takes a quarter of an hour on two otherwise idle cores. Memory is what the largest program allocates on top of the
arrays that are resident between programs (perl_jax/parallel/memory.py).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys

from matplotlib.figure import Figure

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE.parent / 'docs/results'
STORE, PLOT = RESULTS / 'growth.json', RESULTS / 'growth.png'
SCRIPTS = {'reward': ['reward_step.py'], 'rl': ['policy_step.py', '--algorithm=grpo']}
GIN_FLAGS = {'vocab': 'gin.decoder.DecoderConfig.vocab_size', 'layers': 'gin.decoder.DecoderConfig.num_layers'}
COLOURS = {'reward': '#2166c4', 'rl': '#c4512d'}
# The values include those of S. Rank and layers are measured on the reward step only; the RL step scales alike.
AXES = {
    'batch': (('reward', 'rl'), [2, 4, 8, 16, 32]),
    'prompt': (('reward', 'rl'), [32, 64, 128, 256, 512]),
    'response': (('reward', 'rl'), [16, 32, 64, 128, 256]),
    'responses': (('rl',), [1, 2, 4, 8]),
    'vocab': (('reward', 'rl'), [2048, 8192, 32768, 131072]),
    'layers': (('reward',), [1, 2, 4, 8, 16]),
    'rank': (('reward',), [1, 8, 64]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=5, help='number of timed steps per process')
    args = parser.parse_args()
    results = json.loads(STORE.read_text()) if STORE.exists() else {}
    for axis, (kinds, values) in AXES.items():
        for kind in kinds:
            for value in values:
                name = f'{kind} {axis}={value}'
                if name not in results:
                    results[name] = measure(kind, axis, value, args.steps)
                    print(f'{name}: {results[name]["seconds"]:.3g} s', file=sys.stderr)
                    STORE.write_text(json.dumps(results, indent=1) + '\n')
    figure(results).savefig(PLOT, dpi=130)


def measure(kind: str, axis: str, value: int, steps: int) -> dict[str, float]:
    """Measure the seconds of a step and the bytes that it allocates."""
    script, *script_flags = SCRIPTS[kind]
    command = [
        sys.executable,
        str(HERE / script),
        *script_flags,
        f'--{GIN_FLAGS.get(axis, axis)}={value}',
        f'--steps={steps}',
    ]
    environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(process.stdout.strip().splitlines()[-1])
    return {'seconds': figures['seconds'], 'bytes': figures['step_bytes']}


def figure(results: dict[str, dict[str, float]]) -> Figure:
    """Draw a column per axis, seconds above memory, on logarithmic scales; grey lines mark linear growth."""
    figure = Figure(figsize=(2.3 * len(AXES), 5.2), layout='constrained')
    panels = figure.subplots(2, len(AXES), sharey='row', sharex='col', squeeze=False)
    for column, (axis, (kinds, values)) in zip(panels.T, AXES.items()):
        for panel, key, scale in zip(column, ('seconds', 'bytes'), (1, 1e9)):
            for kind in kinds:
                heights = [results[f'{kind} {axis}={value}'][key] / scale for value in values]
                panel.plot(values, heights, 'o-', color=COLOURS[kind], markersize=4, label=kind)
                panel.plot(
                    values, [heights[-1] * value / values[-1] for value in values], color='#b4bbc3', lw=0.8, zorder=0
                )
            panel.set(xscale='log', yscale='log')
            panel.set_xticks(values, [f'{value // 1024}k' if value >= 1024 else str(value) for value in values])
            panel.minorticks_off()
            panel.spines[['top', 'right']].set_visible(False)
        column[1].set_xlabel({'prompt': 'P', 'response': 'R', 'responses': 'K'}.get(axis, axis))
    panels[0, 0].set_ylabel('seconds a step')
    panels[1, 0].set_ylabel('GB added by a step')
    panels[0, 0].legend(frameon=False)
    return figure


if __name__ == '__main__':
    main()
