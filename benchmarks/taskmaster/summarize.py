"""Tables of what train.py measured, with intervals from a bootstrap over conversations.

    export TASKMASTER_DIR=...
    python benchmarks/taskmaster/summarize.py --vocabulary=MODEL.gguf --arrays=DIR --output=FILE.csv DIR...

The folders are train.py's outputs; a cell that several hold is taken from the first.
"""

import argparse
import csv
import json
import pathlib

import numpy as np

from perl_jax.evals import intervals, reward_metrics
from perl_jax.tasks import taskmaster
from perl_jax.tokenizers import vocabularies

KINDS = ('thumbs', 'pairs')


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ('--vocabulary', '--arrays', '--output'):
        parser.add_argument(name, required=True)
    parser.add_argument('folders', nargs='+', type=pathlib.Path)
    args = parser.parse_args()
    cells, scores = {}, {}
    for folder in args.folders:
        for line in (folder / 'cells.jsonl').read_text().splitlines():
            cell = json.loads(line)
            if 'cell' in cell:
                cells.setdefault(cell['cell'], cell)
        with np.load(folder / 'scores.npz') as file:
            scores = {name: file[name] for name in file.files} | scores
    rows = [reward(cell, scores, args.arrays) for cell in cells.values() if cell['what'] in ('rate', 'reward')]
    rows += [policy(cell, scores, args) for cell in cells.values() if cell['what'] == 'policy']
    with open(args.output, 'w') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print({k: v for k, v in row.items() if not k.endswith(('_low', '_high'))})


def reward(cell: dict, scores: dict, arrays: str) -> dict:
    """A reward's row: every metric of the validation split with its 95% interval."""
    row = {k: cell[k] for k in ('what', 'domain', 'tuning', 'rate', 'seed', 'trained', 'seconds_a_step', 'step_bytes')}
    for kind in KINDS:
        if f'{cell["cell"]}-{kind}' not in scores:
            continue
        values = scores[f'{cell["cell"]}-{kind}']
        with np.load(f'{arrays}/{cell["domain"]}_{kind}_validation.npz') as file:
            group, labels = file['group'], file['labels'] if kind == 'thumbs' else None

        def measure(index: np.ndarray, values=values, labels=labels) -> dict[str, float]:
            if labels is None:
                return {'pairwise_accuracy': reward_metrics.ranking(values[index], index)['pairwise_accuracy']}
            return reward_metrics.classification(values[index, 0], labels[index, 0])

        for name, (value, low, high) in intervals.with_intervals(measure, list(group)).items():
            row |= {name: round(value, 4), f'{name}_low': round(low, 4), f'{name}_high': round(high, 4)}
    return row


def policy(cell: dict, scores: dict, args: argparse.Namespace) -> dict:
    """A policy's row: its reward's score of the validation prompts' answers, and what share is well formed."""
    kept = ('what', 'cell', 'tuning', 'rate', 'steps', 'seconds_a_step', 'held', 'peak', 'kl/anchor', 'length/mean')
    row = {k: cell[k] for k in kept}
    vocabulary = vocabularies.vocabulary(args.vocabulary)
    for when, name in ('before', f'sft-for-{cell["tuning"]}'), ('after', cell['cell']):
        if f'{name}-score' not in scores:
            continue
        texts = [
            vocabulary.decode(ids[mask].tolist())
            for ids, mask in zip(scores[f'{name}-targets'][:, 0], scores[f'{name}-targets_mask'][:, 0])
        ]
        formed = np.array([taskmaster.well_formed('', text, {}) for text in texts])
        valid = np.array([taskmaster.valid_coffee_call('', text, {}) for text in texts])
        values = scores[f'{name}-score'][:, 0]
        groups = np.load(f'{args.arrays}/coffee_prompts_validation.npz')['group']

        def measure(index: np.ndarray, values=values, formed=formed, valid=valid) -> dict[str, float]:
            means = {'score': values[index].mean(), 'well_formed': formed[index].mean(), 'valid': valid[index].mean()}
            return {k: float(v) for k, v in means.items()}

        for metric, (value, low, high) in intervals.with_intervals(measure, list(groups)).items():
            names = (f'{metric}_{when}', f'{metric}_{when}_low', f'{metric}_{when}_high')
            row |= dict(zip(names, (round(value, 4), round(low, 4), round(high, 4))))
        print(name, [text[:60] for text in texts[:3]])
    return row


if __name__ == '__main__':
    main()
