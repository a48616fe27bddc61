"""Converts Taskmaster Coffee and Ticketing to arrays, for train.py on a machine without TensorFlow.

    TASKMASTER_DIR=... python benchmarks/taskmaster/prepare.py --vocabulary=MODEL.gguf --output=DIR

Writes DIR/DOMAIN_KIND_SPLIT.npz (arrays with one row per example, and the group of each row) and DIR/eos.txt.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

import perl_jax.tasks.taskmaster  # noqa: F401 (registers the tasks)
from perl_jax.data import datasets
from perl_jax.errors import UserError

LENGTHS = {
    'sft': {'inputs': 256, 'targets': 64},
    'thumbs': {'inputs': 256, 'targets': 128},
    'pairs': {'inputs': 256, 'targets': 128},
    'prompts': {'inputs': 256},
}
DOMAINS = ('coffee', 'ticketing')
SKIPPED = {('ticketing', 'pairs')}  # its 14 training pairs are too few


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--vocabulary', required=True)
    parser.add_argument('--output', required=True, type=pathlib.Path)
    args = parser.parse_args()
    try:
        convert(args.vocabulary, args.output)
    except UserError as error:
        sys.exit(f'prepare.py: {error}')


def convert(vocabulary: str, output: pathlib.Path) -> None:
    """Write the arrays of all domains, kinds and splits."""
    output.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for kind, lengths in LENGTHS.items():
            if (domain, kind) in SKIPPED:
                continue
            for split in ('train', 'validation'):
                config = datasets.DatasetConfig(f'taskmaster_{domain}_{kind}', lengths, 1, split, vocabulary)
                dataset = datasets.load(config, kind)
                groups = np.array([str(example.get('group', i)) for i, example in enumerate(dataset.examples)])
                np.savez_compressed(output / f'{domain}_{kind}_{split}.npz', group=groups, **dataset.arrays)
                (output / 'eos.txt').write_text(json.dumps(dataset.eos_ids))
                num_full = {
                    k: int((v.sum(-1) == v.shape[-1]).sum()) for k, v in dataset.arrays.items() if k.endswith('mask')
                }
                print(domain, kind, split, len(dataset), 'rows; at the maximum length:', num_full, flush=True)


if __name__ == '__main__':
    main()
