"""The origin of a run: run.json of a MODEL_DIR records the run's base, and so on back to the original weights.

    runs/policy -> runs/sft -> /models/Llama-3.2-1B       chain('runs/policy'); origin('runs/policy') is the last

It also records the rewards that a policy learned from, by what they are, so that they may be moved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from flax import linen as nn

from perl_jax.errors import UserError
from perl_jax.interop import gguf, hf
from perl_jax.models.decoder import Decoder
from perl_jax.runs import rundir


def chain(path: str) -> list[str]:
    """Returns `path` and each base before it; the last one is the original weights.

    Args:
      path: a MODEL_DIR, or weights: a file, a folder, hf://OWNER/NAME, random:SEED.

    Raises:
      UserError: a run.json that no run has written.
    """
    paths = [path]
    while not paths[-1].startswith(hf.HUB) and (run_info := rundir.read(paths[-1])) is not None:
        paths.append(run_info['base']['path'])
    return paths


def origin(path: str) -> str:
    """Returns the original weights that everything at `path` was trained on."""
    return chain(path)[-1]


def identity(run_info: Mapping[str, Any]) -> str | None:
    """Returns what a run is, wherever its folder lies: its start, tuning and base; None if run.json has no start."""
    start, base = run_info.get('started'), (run_info.get('base') or {}).get('fingerprint')
    return None if start is None else f'{run_info["phase"]} {run_info.get("tuning")} {start} on {base}'


def rewards(paths: Iterable[str]) -> list[str]:
    """Returns the identities of these rewards, of those averaged in them, and of those that policies learned from.

    Args:
      paths: MODEL_DIRs; anything else is left out. `rewards` in their run.json has what lies further back.
    """
    infos = [rundir.read(path) for path in paths if not path.startswith(hf.HUB)]
    recorded = {name for run_info in infos if run_info for name in run_info.get('rewards') or ()}
    named = {identity(run_info) for run_info in infos if run_info and run_info['phase'] == 'reward'}
    return sorted(recorded.union(name for name in named if name is not None))


def network(path: str | None) -> nn.Module:
    """Returns the network of the weights at `path`, or of a run's original weights: `NETWORK = @hf.network()`.

    Args:
      path: a Hugging Face folder, hf://OWNER/NAME, a .gguf file, or a MODEL_DIR whose base is one of these.

    Raises:
      UserError: no such path, or weights that do not describe their network.
    """
    if not path:
        raise UserError(
            'models/from_hf.gin: set INITIAL_CHECKPOINT_PATH to a Hugging Face folder, hf://OWNER/NAME or a .gguf file'
        )
    weights = origin(path)
    if weights.endswith('.gguf'):
        return Decoder(gguf.config(weights))
    if weights != path and not hf.is_checkpoint(weights):
        raise UserError(
            f"models/from_hf.gin: '{path}' started from '{weights}', which does not describe its network; "
            'give the model file that it was trained with, such as models/toy.gin'
        )
    return hf.network(weights)
