"""Memory of a training step on one device: arrays between its programs, and what the largest program adds.

It is measured from JAX's live arrays and compiled programs, so that loops need no hooks and a CPU can report it too.
"""

from __future__ import annotations

from typing import Any

import jax


def programs() -> set[Any]:
    """Returns the compiled programs of this process."""
    return set(jax.local_devices()[0].client.live_executables())


def live_bytes() -> int:
    """Returns the bytes of all live arrays on the first device, each buffer once: bases, states, batches."""
    device = jax.local_devices()[0]
    buffers = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            if shard.device == device:
                buffers[shard.data.unsafe_buffer_pointer()] = shard.data.nbytes
    return sum(buffers.values())


def program_bytes(stats: Any) -> int:
    """Returns the bytes that a program adds to its arguments: temporaries, and outputs that reuse no input."""
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes


def measure(old_programs: set[Any], live: int) -> dict[str, int]:
    """Returns bytes on the first device: 'held' between programs, and 'peak' in the largest program.

    Args:
      old_programs: programs that do not count, as they were compiled before.
      live: bytes of live arrays between programs (`live_bytes`).

    Returns:
      'held', 'peak', and 'device_peak' since the process began where the device counts it.
    """
    extra_bytes = [program_bytes(program.get_compiled_memory_stats()) for program in programs() - old_programs]
    sizes = {'held': live, 'peak': live + max(extra_bytes, default=0)}
    device_stats = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in device_stats:
        sizes['device_peak'] = device_stats['peak_bytes_in_use']
    return sizes
