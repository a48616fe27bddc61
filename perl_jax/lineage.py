"""Where a base comes from: a MODEL_DIR says in run.json what it was trained on, and so back to the weights themselves.

    runs/policy -> runs/sft -> /models/Llama-3.2-1B       chain('runs/policy'), origin('runs/policy') is the last
"""

from __future__ import annotations

from perl_jax import rundir
from perl_jax.interop import hf


def chain(path: str) -> list[str]:
    """List `path` and each base behind it, the weights that no run has made last.

    Args:
      path: a MODEL_DIR, or weights: a file, a folder, hf://OWNER/NAME, random:SEED.

    Raises:
      UserError: a run.json that no run has written.
    """
    paths = [path]
    while not paths[-1].startswith(hf.HUB) and (about := rundir.read(paths[-1])) is not None:
        paths.append(about['base']['path'])
    return paths


def origin(path: str) -> str:
    """The weights that everything at `path` was trained on."""
    return chain(path)[-1]
