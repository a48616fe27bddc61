"""Where a base comes from: a MODEL_DIR says in run.json what it was trained on, and so back to the weights themselves.

    runs/policy -> runs/sft -> /models/Llama-3.2-1B       chain('runs/policy'), origin('runs/policy') is the last
"""

from __future__ import annotations

from flax import linen as nn

from perl_jax.errors import UserError
from perl_jax.interop import gguf, hf
from perl_jax.models.decoder import Decoder
from perl_jax.runs import rundir


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


def network(path: str | None) -> nn.Module:
    """The network of the weights at `path`, or of those that a run there started from: `NETWORK = @hf.network()`.

    Args:
      path: a Hugging Face folder, hf://OWNER/NAME, a .gguf file, or a MODEL_DIR whose base is one of these.

    Raises:
      UserError: there is none, or weights that do not say what network they are of.
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
            f"models/from_hf.gin: '{path}' started from '{weights}', which does not say its network; "
            'give the model file that it was trained with, such as models/toy.gin'
        )
    return hf.network(weights)
