"""How much memory a training step takes on one device: what is held between its programs, and what the largest adds.

It is read from what JAX keeps and has compiled: no loop has to say anything, and a CPU can say what a step would take.
"""

from __future__ import annotations

from typing import Any

import jax


def programs() -> set[Any]:
    """The compiled programs that this process holds."""
    return set(jax.local_devices()[0].client.live_executables())


def held() -> int:
    """Bytes of all live arrays on the first device, each buffer once: bases, states, batches."""
    device = jax.local_devices()[0]
    buffers = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.device == device:
                buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(buffers.values())


def added(stats: Any) -> int:
    """Bytes that a program adds to its arguments: temporaries, and outputs that do not take the place of an input."""
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def measure(before: set[Any], between: int) -> dict[str, int]:
    """Bytes on the first device: 'held' `between` programs, and the 'peak' in the largest of those since `before`.

    Where the device counts for itself, also its own 'device_peak' since the process began.
    """
    adds = [added(program.get_compiled_memory_stats()) for program in programs() - before]
    found = {'held': between, 'peak': between + max(adds, default=0)}
    counted = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in counted:
        found['device_peak'] = counted['peak_bytes_in_use']
    return found
