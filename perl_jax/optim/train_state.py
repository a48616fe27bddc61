"""Creating and updating the training state of a role. The optimizer sees the adapter alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from perl_jax.models import lora
from perl_jax.models.lora import FullSpec, LoraSpec
from perl_jax.types import TrainState


def create(
    rng: jax.Array,
    base: PyTree,
    spec: LoraSpec | FullSpec,
    tx: optax.GradientTransformation,
    head: tuple[int, float] | None = None,
    head_rng: jax.Array | None = None,
) -> TrainState:
    """Create the state of a role at step 0.

    Args:
      rng: initializes the adapter.
      base: the frozen parameters, or their shapes.
      spec: LoRA or full tuning.
      tx: the optimizer.
      head: (D, standard deviation) of the scalar head of a reward or a value; None adds no head.
      head_rng: initializes the head; None takes `rng`.

    Returns:
      The state; its optimizer's covers the adapter alone.
    """
    adapter = spec.init(rng, base)
    if head is not None:
        adapter = lora.with_head(adapter, jax.random.fold_in(rng if head_rng is None else head_rng, 1), *head)
    opt_state = tx.init(adapter)  # pyright: ignore[reportArgumentType]  optax's Params names no tree but dicts and lists
    return TrainState(step=jnp.int32(0), adapter=adapter, opt_state=opt_state)


def update(state: TrainState, grads: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """Apply one optimizer update.

    Args:
      state: of a role.
      grads: a tree like the adapter.
      tx: the optimizer; a scheduled one gets the step (schedules.py).

    Returns:
      The next state, whose step is one more.
    """
    tx = optax.with_extra_args_support(tx)
    updates, opt_state = tx.update(grads, state.opt_state, state.adapter, step=state.step)
    return TrainState(state.step + 1, optax.apply_updates(state.adapter, updates), opt_state)


def compile_step(step: Callable[..., Any], shardings: PyTree) -> Callable[..., Any]:
    """Jit a training step with a donated state.

    Args:
      step: (base, state, ...) -> the next state, metrics.
      shardings: the sharding of each array of the state, before and after: left to XLA, the next state would get other
        ones, and donating would alias nothing.

    Returns:
      The jitted step.
    """
    return jax.jit(step, donate_argnums=1, out_shardings=(shardings, None))
