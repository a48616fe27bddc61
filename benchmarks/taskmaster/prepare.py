"""Taskmaster Coffee and Ticketing as arrays, for train.py on a machine without TensorFlow.

    TASKMASTER_DIR=... python benchmarks/taskmaster/prepare.py --vocabulary=MODEL.gguf --output=DIR

Writes DIR/DOMAIN_KIND_SPLIT.npz (the batch's arrays, one row an example, and each row's group) and DIR/eos.txt.
"""

import argparse
import json
import pathlib

import numpy as np

import perl_jax.tasks.taskmaster  # noqa: F401 (registers the tasks)
from perl_jax.data import datasets

LENGTHS = {
    'sft': {'inputs': 256, 'targets': 64},
    'thumbs': {'inputs': 256, 'targets': 128},
    'pairs': {'inputs': 256, 'targets': 128},
    'prompts': {'inputs': 256},
}
DOMAINS = ('coffee', 'ticketing')
NEITHER = {('ticketing', 'pairs')}  # 14 pairs to train on are too few


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument('--vocabulary', required=True)
    parser.add_argument('--output', required=True, type=pathlib.Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for kind, lengths in LENGTHS.items():
            if (domain, kind) in NEITHER:
                continue
            for split in ('train', 'validation'):
                config = datasets.DatasetConfig(f'taskmaster_{domain}_{kind}', lengths, 1, split, args.vocabulary)
                found = datasets.load(config, kind)
                group = np.array([str(e.get('group', i)) for i, e in enumerate(found.examples)])
                np.savez_compressed(args.output / f'{domain}_{kind}_{split}.npz', group=group, **found.arrays)
                (args.output / 'eos.txt').write_text(json.dumps(found.eos_ids))
                full = {k: int((v.sum(-1) == v.shape[-1]).sum()) for k, v in found.arrays.items() if k.endswith('mask')}
                print(domain, kind, split, len(found), 'rows; as long as there is room:', full, flush=True)


if __name__ == '__main__':
    main()
