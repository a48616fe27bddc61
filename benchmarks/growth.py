"""How time and memory of a step grow: reward_step.py and policy_step.py at sizes around S, one changed at a time.

    python benchmarks/growth.py        what is not in docs/results/growth.json yet, then docs/growth.png

A quarter of an hour on two cores, which should have nothing else to do. Memory is what the largest program adds to
what lies on the device between programs (perl_jax/parallel/memory.py).
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
DOCS = HERE.parent / 'docs'
STORE, PLOT = DOCS / 'results/growth.json', DOCS / 'growth.png'
STEPS = {'reward': ['reward_step.py'], 'rl': ['policy_step.py', '--algorithm=grpo']}
CONFIG = {'vocab': 'gin.decoder.DecoderConfig.vocab_size', 'layers': 'gin.decoder.DecoderConfig.num_layers'}
COLOURS = {'reward': '#2166c4', 'rl': '#c4512d'}
# What S has is among the values. Rank and layers of the RL step follow those of the reward step.
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
    parser.add_argument('--steps', type=int, default=5, help='that are timed in each process')
    args = parser.parse_args()
    found = json.loads(STORE.read_text()) if STORE.exists() else {}
    for axis, (works, values) in AXES.items():
        for work in works:
            for value in values:
                name = f'{work} {axis}={value}'
                if name not in found:
                    found[name] = ran(work, axis, value, args.steps)
                    print(f'{name}: {found[name]["seconds"]:.3g} s', file=sys.stderr)
                    STORE.write_text(json.dumps(found, indent=1) + '\n')
    figure(found).savefig(PLOT, dpi=130)


def ran(work: str, axis: str, value: int, steps: int) -> dict[str, float]:
    """Seconds a step and bytes that it adds."""
    script, *more = STEPS[work]
    command = [sys.executable, str(HERE / script), *more, f'--{CONFIG.get(axis, axis)}={value}', f'--steps={steps}']
    on = os.environ | {'JAX_PLATFORMS': 'cpu'}
    done = subprocess.run(command, env=on, stdout=subprocess.PIPE, text=True, check=True)
    line = json.loads(done.stdout.strip().splitlines()[-1])
    return {'seconds': line['seconds'], 'bytes': line['step_bytes']}


def figure(found: dict[str, dict[str, float]]) -> Figure:
    """A column an axis: seconds above, memory below; all scales are logarithmic, and grey lines grow as the axis."""
    picture = Figure(figsize=(2.3 * len(AXES), 5.2), layout='constrained')
    panels = picture.subplots(2, len(AXES), sharey='row', sharex='col', squeeze=False)
    for column, (axis, (works, values)) in zip(panels.T, AXES.items()):
        for panel, key, scale in zip(column, ('seconds', 'bytes'), (1, 1e9)):
            for work in works:
                ys = [found[f'{work} {axis}={value}'][key] / scale for value in values]
                panel.plot(values, ys, 'o-', color=COLOURS[work], markersize=4, label=work)
                panel.plot(values, [ys[-1] * value / values[-1] for value in values], color='#b4bbc3', lw=0.8, zorder=0)
            panel.set(xscale='log', yscale='log')
            panel.set_xticks(values, [f'{value // 1024}k' if value >= 1024 else str(value) for value in values])
            panel.minorticks_off()
            panel.spines[['top', 'right']].set_visible(False)
        column[1].set_xlabel({'prompt': 'P', 'response': 'R', 'responses': 'K'}.get(axis, axis))
    panels[0, 0].set_ylabel('seconds a step')
    panels[1, 0].set_ylabel('GB added by a step')
    panels[0, 0].legend(frameon=False)
    return picture


if __name__ == '__main__':
    main()
