"""T5X's logical axis rules: the mesh axis ('replica', 'data', 'model') of each logical axis of an array."""

from __future__ import annotations

from collections.abc import Sequence

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]


def standard_logical_axis_rules(
    activation_partitioning_dims: int = 1, parameter_partitioning_dims: int = 1, additional_rules: Rules = ()
) -> Rules:
    """Returns the mesh axis of each logical axis: T5X's function of this name, with an axis for LoRA.

    An array uses a mesh axis once, by the first rule that matches. So 'embed' on 'data' splits only parameters (FSDP,
    `parameter_partitioning_dims` = 2), since an activation's batch already uses 'data'; 'embed' on 'model' splits the
    activations between layers (`activation_partitioning_dims` = 2).

    Args:
      activation_partitioning_dims: 1 or 2 axes along which activations are split.
      parameter_partitioning_dims: 1 or 2 axes along which parameters are split.
      additional_rules: (logical axis, mesh axis) each; they come last.

    Returns:
      The rules, (logical axis, mesh axis or axes) each.
    """
    embed = [('embed', 'model')] * (activation_partitioning_dims == 2)
    embed += [('embed', 'data')] * (parameter_partitioning_dims == 2)
    return (
        ('batch', ('replica', 'data')),
        ('vocab', 'model'),
        ('mlp', 'model'),
        ('heads', 'model'),
        ('kv_heads', 'model'),
        ('joined_kv', 'model'),
        *embed,
        *additional_rules,
        ('embed', None),
        ('kv', None),
        ('relpos_buckets', None),
        ('length', None),
        ('layers', None),
        ('lora_rank', None),
    )
