"""Averages the weights of several runs into one: WARM (Rame et al. 2024, arXiv 2401.12187) for adapters.

The weight updates A B are averaged, not the factors A and B (averaging.py). As in WARM, rewards should be fine-tuned
from one base and one initial head (HEAD_SEED), otherwise their average may be meaningless.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from etils import epath

from perl_jax.data import vocabulary
from perl_jax.errors import UserError
from perl_jax.models import averaging
from perl_jax.runs import finished, rundir
from perl_jax.train import loop


def run(model_dirs: Sequence[str], model_dir: str, rank: int | None = None) -> None:
    """Average the best checkpoints of several runs of one phase into a new MODEL_DIR.

    All members of an ensemble run are included; the value adapters of policies are not.

    Args:
      model_dirs: the MODEL_DIRs of the runs.
      model_dir: the new MODEL_DIR.
      rank: truncates the average to this rank and logs the approximation error. None keeps the exact average, whose
        rank is the sum of the members' ranks.

    Raises:
      UserError: the runs differ in phase, base, vocabulary or tuning, or `model_dir` already exists.
    """
    first_dir, adapters = model_dirs[0], []
    about = rundir.read(first_dir)
    if about is None:
        raise UserError(f"average: '{first_dir}' is not the MODEL_DIR of a run: it has no run.json")
    vocabulary_names = {key: about[key] for key in vocabulary.RUN_FIELDS if key in about}
    phase, role = about['phase'], 'reward' if about['phase'] == 'reward' else 'policy'
    for folder in model_dirs:
        member_about = rundir.read(folder) or {}
        if any(
            None not in (name, member_about.get(key)) and name != member_about[key]
            for key, name in vocabulary_names.items()
        ):
            raise UserError(
                f"average: '{folder}' has another vocabulary than '{first_dir}'; average runs of one vocabulary"
            )
    for folder in model_dirs:
        role_adapters, member_about = finished.read_adapters(folder, phase=phase, flag='average')
        if member_about['base']['fingerprint'] != about['base']['fingerprint']:
            raise UserError(f"average: '{folder}' is on another base than '{first_dir}'; average runs of one base")
        adapters += [adapter for name, adapter in role_adapters.items() if name.startswith(role)]
    if len({adapter.lora is None for adapter in adapters}) > 1:
        raise UserError('average: some of these runs use LoRA and some full tuning; average runs of one kind')
    averaged = averaging.concatenate(adapters, [1 / len(adapters)] * len(adapters))
    if rank is not None:
        if averaged.lora is None:
            raise UserError('average: --rank applies to LoRA only; remove it for full tuning')
        averaged, error = averaging.truncate(averaged, rank)
        logging.getLogger('perl_jax').info(f'average: rank {rank} is {float(error):.1%} off the exact average')
    config_text = epath.Path(first_dir, 'config.gin').read_text()
    with rundir.complete_folder(model_dir) as folder:
        loop.write_finished_run(
            folder, phase, role, averaged, base=about['base'], base_parameters=about['base_parameters'],
            vocabulary=vocabulary_names, source=rundir.AVERAGE + ', '.join(model_dirs), config_text=config_text,
            members=model_dirs,
        )  # fmt: skip
    print(model_dir)
