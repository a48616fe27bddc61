"""Learning-rate schedules by the step of the loop, for any optimizer.

    rate of update n = LEARNING_RATE schedule(n // updates per step)

A step of PPO makes epochs x minibatches updates, and optax's own schedules count updates. A schedule is any optax
schedule with values from 0 to 1: `SCHEDULE = @optax.warmup_cosine_decay_schedule()` with a peak_value of 1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, PyTree

from perl_jax import settings
from perl_jax.errors import UserError


def constant(step: ArrayLike) -> Float[Array, '*steps']:
    """The full learning rate at every step.

    Args:
      step: of the loop, a number or an array.

    Returns:
      float32 1, in the shape of `step`.
    """
    return jnp.ones_like(step, jnp.float32)


@settings.checked
def linear(warmup_steps: settings.Natural = 0, decay_steps: settings.Count | None = None) -> optax.Schedule:
    """Linear warm-up from 0 times linear decay to 0, a product as in T5X's schedules.

    Args:
      warmup_steps: 0 starts at the full rate (WARM's policies: 2000).
      decay_steps: the step at which the rate is 0; None never decays.

    Returns:
      step -> factor of the learning rate, from 0 to 1.
    """
    def share(step: ArrayLike) -> Float[Array, '*steps']:
        rise = jnp.minimum(jnp.divide(step, warmup_steps), 1.0) if warmup_steps else jnp.float32(1)
        fall = jnp.float32(1) if decay_steps is None else jnp.clip(1 - jnp.divide(step, decay_steps), 0.0, 1.0)
        return rise * fall

    return share


def scheduled(
    name: str, tx: optax.GradientTransformation, schedule: optax.Schedule, updates: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Scale an optimizer's updates by a schedule. The state stays the optimizer's, so a resumed run may change it.

    In optax's adafactor (without momentum), adam, adamw and sgd the learning rate is the last factor, so this equals a
    schedule inside the optimizer.

    Args:
      name: the optimizer's macro, for messages.
      tx: the optimizer.
      schedule: step of the loop -> factor of the learning rate.
      updates: optimizer updates per step of the loop.

    Returns:
      An optimizer whose `update` also takes `step`.

    Raises:
      UserError: as `check`.
    """
    check(name, tx, schedule, updates)
    tx = optax.with_extra_args_support(tx)

    def update(
        grads: PyTree, state: PyTree, params: PyTree | None = None, *, step: Int[Array, ''], **extra: Any
    ) -> tuple[PyTree, PyTree]:
        change, state = tx.update(grads, state, params, **extra)
        share = schedule(step // updates)
        return jax.tree.map(lambda x: (share * x).astype(x.dtype), change), state

    # optax's protocol has no required keyword.
    return optax.GradientTransformationExtraArgs(tx.init, update)  # pyright: ignore[reportArgumentType]


def check(name: str, tx: optax.GradientTransformation, schedule: optax.Schedule, updates: int = 1) -> None:
    """Raise if an optimizer cannot be scheduled.

    Args:
      name: the optimizer's macro, for messages.
      tx: the optimizer.
      schedule: step of the loop -> factor of the learning rate.
      updates: optimizer updates per step of the loop.

    Raises:
      UserError: `tx` is not an optax optimizer (but T5X's own, for example), or has a schedule of its own, which counts
        updates, while a step makes several.
    """
    if not (hasattr(tx, 'init') and hasattr(tx, 'update')):
        raise UserError(
            f"{name} is {type(tx).__module__}.{type(tx).__name__}, no optimizer of optax: a T5X model file, which sets "
            f'its own, comes before the recipe; or add --gin.{name}=@optax.adafactor()'
        )
    if not callable(schedule):
        raise UserError(f'{name}: its schedule is {schedule!r}; give a function of the step, as @schedules.linear() is')
    if updates > 1 and _has_schedule(tx):
        raise UserError(
            f'{name} has a schedule of its own, which counts updates: {updates} a step with this ALGORITHM; give its '
            'learning rate as a number, and SCHEDULE (VALUE_SCHEDULE) as shares of it by step'
        )


def _has_schedule(tx: optax.GradientTransformation) -> bool:
    state = tx.init({'w': jnp.zeros((1, 1))})
    kinds = optax.ScaleByScheduleState, optax.InjectStatefulHyperparamsState
    is_schedule = lambda x: isinstance(x, kinds)  # noqa: E731
    return any(map(is_schedule, jax.tree.leaves(state, is_leaf=is_schedule)))
