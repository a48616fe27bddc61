"""One run made of several by averaging their weights: WARM (Rame et al. 2024, arXiv 2401.12187) for adapters.

Done right: what the adapters do to the weights is averaged, A B and not A and B (averaging.py). The rewards should be
fine-tuned from one base and one head (HEAD_SEED), as WARM's are, or their average may mean nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from etils import epath

from perl_jax.data import vocabulary
from perl_jax.errors import UserError, check_count
from perl_jax.models import averaging
from perl_jax.runs import finished, rundir
from perl_jax.train import loop


def run(model_dirs: Sequence[str], model_dir: str, rank: int | None = None) -> None:
    """Average the best checkpoints of runs of one phase, all members of ensembles among them, into a new `model_dir`.

    The average is exact, its rank the sum of the members'; `rank` cuts it to the nearest of that rank, and says by how
    much that changes it. The value of policies is left out.

    Raises:
      UserError: runs of different phases, bases, vocabularies or tunings, or a `model_dir` that is there.
    """
    first, members = model_dirs[0], []
    about = rundir.read(first)
    if about is None:
        raise UserError(f"average: '{first}' is not the MODEL_DIR of a run: it has no run.json")
    words = {key: about[key] for key in vocabulary.NAMED if key in about}
    phase, role = about['phase'], 'reward' if about['phase'] == 'reward' else 'policy'
    for folder in model_dirs:
        other = rundir.read(folder) or {}
        if any(None not in (name, other.get(key)) and name != other[key] for key, name in words.items()):
            raise UserError(f"average: '{folder}' reads with another vocabulary than '{first}'; average runs of one")
    for folder in model_dirs:
        adapters, of = finished.read_adapters(folder, phase=phase, flag='average')
        if of['base']['fingerprint'] != about['base']['fingerprint']:
            raise UserError(f"average: '{folder}' is on another base than '{first}'; average runs of one base")
        members += [adapter for name, adapter in adapters.items() if name.startswith(role)]
    if len({member.lora is None for member in members}) > 1:
        raise UserError('average: some of these runs are LoRA and some full tuning; average one kind')
    made = averaging.concatenate(members, [1 / len(members)] * len(members))
    if rank is not None:
        check_count('average: --rank', rank)
        if made.lora is None:
            raise UserError('average: --rank is for LoRA; full tuning is averaged as it is')
        made, error = averaging.truncate(made, rank)
        logging.getLogger('perl_jax').info(f'average: rank {rank} is {float(error):.1%} off the exact average')
    config_text = epath.Path(first, 'config.gin').read_text()
    with rundir.whole(model_dir) as folder:
        loop.made(
            folder, phase, role, made, base=about['base'], base_parameters=about['base_parameters'], vocabulary=words,
            source=rundir.AVERAGE + ', '.join(model_dirs), config_text=config_text,
        )  # fmt: skip
    print(model_dir)
