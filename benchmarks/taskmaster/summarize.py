"""Tables of train.py's results, with intervals from a bootstrap over conversations.

    export TASKMASTER_DIR=...
    python benchmarks/taskmaster/summarize.py --vocabulary=MODEL.gguf --arrays=DIR --output=FILE.csv DIR...

The folders are train.py's outputs; a cell that occurs in several is read from the first.
"""

import argparse
import csv
import json
import pathlib

import numpy as np

from perl_jax.evals import intervals, reward_metrics
from perl_jax.tasks import dialog_text, taskmaster
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
    """Return a reward's row: every metric of the validation split with its 95% interval."""
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

        for name, figure in intervals.with_intervals(measure, list(group), rates=reward_metrics.RATES).items():
            row |= dict(zip((name, f'{name}_low', f'{name}_high'), map(rounded, figure)))
    return row


def policy(cell: dict, scores: dict, args: argparse.Namespace) -> dict:
    """Return a policy's row: its score on validation prompts, and the shares of well-formed and valid answers.

    Valid is an answer that is well formed and, if it is a call, has a known API and known arguments. Whether its values
    occur in the context is not looked at: the arrays hold only the ends of the contexts.
    """
    columns = ('what', 'cell', 'tuning', 'rate', 'steps', 'seconds_a_step', 'held', 'peak', 'kl/anchor', 'length/mean')
    row = {k: cell[k] for k in columns}
    vocabulary, known_calls = vocabularies.vocabulary(args.vocabulary), taskmaster.known_calls('coffee')
    for prefix, name in ('before', f'sft-for-{cell["tuning"]}'), ('after', cell['cell']):
        if f'{name}-score' not in scores:
            continue
        texts = [
            vocabulary.decode(ids[mask].tolist())
            for ids, mask in zip(scores[f'{name}-targets'][:, 0], scores[f'{name}-targets_mask'][:, 0])
        ]
        well_formed = np.array([dialog_text.is_well_formed(text) for text in texts])
        valid = np.array([dialog_text.is_well_formed(text, known_calls) for text in texts])
        values = scores[f'{name}-score'][:, 0]
        groups = np.load(f'{args.arrays}/coffee_prompts_validation.npz')['group']

        def measure(index: np.ndarray, values=values, well_formed=well_formed, valid=valid) -> dict[str, float]:
            means = {
                'score': values[index].mean(),
                'well_formed': well_formed[index].mean(),
                'valid': valid[index].mean(),
            }
            return {k: float(v) for k, v in means.items()}

        rates = 'well_formed', 'valid'
        for metric, figure in intervals.with_intervals(measure, list(groups), rates=rates).items():
            names = (f'{metric}_{prefix}', f'{metric}_{prefix}_low', f'{metric}_{prefix}_high')
            row |= dict(zip(names, map(rounded, figure)))
        print(name, [text[:60] for text in texts[:3]])
    return row


def rounded(number: float | None) -> float | None:
    """Return a number of the table; None stays, where no interval can be given."""
    return None if number is None else round(number, 4)


if __name__ == '__main__':
    main()
