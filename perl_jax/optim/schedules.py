"""Learning rates over a run: a share of the rate, by the step of the loop, whatever optimizer is under it.

    rate of update n = LEARNING_RATE schedule(n // updates a step)

A step of PPO makes epochs x minibatches updates, and optax's own schedules count those. A schedule is any function of
optax's kind that gives the share: `SCHEDULE = @optax.warmup_cosine_decay_schedule()` with a peak_value of 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from perl_jax.errors import UserError, check_count


def constant(step: ArrayLike) -> Float[Array, '']:
    """The whole rate at every step."""
    return jnp.ones_like(step, jnp.float32)


def linear(warmup_steps: int = 0, decay_steps: int | None = None) -> optax.Schedule:
    """Rise from 0 over `warmup_steps`, and fall to 0 at `decay_steps`: the product, as T5X multiplies its factors.

    Args:
      warmup_steps: 0 starts at the whole rate (WARM's policies: 2000).
      decay_steps: None never falls.

    Returns:
      step -> share of the learning rate, from 0 to 1.
    """
    check_count('WARMUP_STEPS', warmup_steps, 0)
    if decay_steps is not None:
        check_count('DECAY_STEPS', decay_steps)

    def share(step: ArrayLike) -> Float[Array, '']:
        rise = jnp.minimum(jnp.divide(step, warmup_steps), 1.0) if warmup_steps else jnp.float32(1)
        fall = jnp.float32(1) if decay_steps is None else jnp.clip(1 - jnp.divide(step, decay_steps), 0.0, 1.0)
        return rise * fall

    return share


def scheduled(
    name: str, tx: optax.GradientTransformation, schedule: optax.Schedule, updates: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Scale what an optimizer does by a schedule; its state is the optimizer's own, so that a schedule may change.

    The learning rate is the last factor of optax's adafactor (without momentum), adam, adamw and sgd, so this is the
    same as a rate that is scheduled inside.

    Args:
      name: of the optimizer's macro.
      updates: how many updates a step of the loop makes.

    Raises:
      UserError: what is no optimizer of optax, such as T5X's own; or one with a schedule of its own, which would count
        updates, where a step makes several.
    """
    if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
        raise UserError(
            f"{name} is {type(tx).__module__}.{type(tx).__name__}, no optimizer of optax: a T5X model file, which sets "
            f'its own, comes before the recipe; or add --gin.{name}=@optax.adafactor()'
        )
    if not callable(schedule):
        raise UserError(f'{name}: its schedule is {schedule!r}; give a function of the step, as @schedules.linear() is')
    tx = optax.with_extra_args_support(tx)
    if updates > 1 and _has_schedule(tx):
        raise UserError(
            f'{name} has a schedule of its own, which counts updates: {updates} a step with this ALGORITHM; give its '
            'learning rate as a number, and SCHEDULE (VALUE_SCHEDULE) as shares of it by step'
        )

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, step: Int[Array, ''], **extra: Any
    ) -> tuple[PyTree, PyTree]:
        change, state = tx.update(grads, state, params, **extra)
        share = schedule(step // updates)
        return jax.tree.map(lambda x: (share * x).astype(x.dtype), change), state

    # optax's protocol has no keyword that must be given.
    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore[reportArgumentType]


def _has_schedule(tx: optax.GradientTransformation) -> bool:
    state = tx.init({'w': jnp.zeros((1, 1))})
    kinds = optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState
    is_schedule = lambda x: isinstance(x, kinds)  # noqa: E731
    return any(map(is_schedule, jax.tree.leaves(state, is_leaf=is_schedule)))
