"""The logs of a run, cut back to a step where it is resumed: metrics.jsonl, samples.jsonl, events for TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from typing import Any

from etils import epath


def truncate(path: str, last_step: int) -> None:
    """Keep the valid lines up to `last_step`, as an uninterrupted run would have written them."""
    if epath.Path(path).exists():
        replace(path, ''.join(f'{line}\n' for line, entry in entries(path) if entry['step'] <= last_step))


def entries(path: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the valid lines of a log, each with its object, whose 'step' is a number; says how many are not."""
    lines = epath.Path(path).read_bytes().split(b'\n')[:-1]  # an incomplete last line, of a killed process, is dropped
    valid = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # as after a power failure
            entry = json.loads(text := line.decode('utf-8'))
            if math.isfinite(entry['step']):
                valid.append((text, entry))
    if invalid_count := len(lines) - len(valid):
        logging.getLogger('perl_jax').warning(f'{path}: {invalid_count} lines are not valid entries of a step; dropped')
    return valid


def truncate_events(model_dir: str, last_step: int) -> None:
    """Drop the events for TensorBoard of later steps, which would be shown twice when the run has come there again."""
    for draft_file in epath.Path(model_dir).glob('events.out.tfevents.*.tmp'):  # of a process that was killed here
        draft_file.unlink()
    paths = sorted(epath.Path(model_dir).glob('events.out.tfevents.*'))
    if not paths:
        return
    import tensorflow as tf
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    for path in paths:
        records = []
        with contextlib.suppress(tf.errors.DataLossError):  # an incomplete last record, of a killed process
            for record in tf.data.TFRecordDataset(os.fspath(path)):
                records.append(record.numpy())
        draft_file = epath.Path(f'{os.fspath(path)}.tmp')
        with tf.io.TFRecordWriter(os.fspath(draft_file)) as writer:
            for record in records:
                if Event.FromString(record).step <= max(last_step, 0):  # 0: the file's version
                    writer.write(record)
        draft_file.replace(path)


def replace(path: str, text: str) -> None:
    """Replace a file atomically: a killed process leaves the old one."""
    draft_file = epath.Path(path + '.tmp')
    draft_file.write_text(text)
    draft_file.replace(path)
