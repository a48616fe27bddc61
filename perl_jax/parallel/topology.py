"""TPU topologies by name: 'v5e:4x4' is a slice of 16 chips, '2xv5e:4x4' are two slices; tpu7x has two devices a chip.

Programs can be compiled for their devices on any machine: JAX lowers and libtpu compiles.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from perl_jax.errors import UserError
from perl_jax.parallel.stderr import silenced


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip, which is one device of JAX; of Ironwood (tpu7x) two, and hbm, peak and clock are of one device.

    Attributes:
      device_kind: libtpu's name.
      hbm: bytes available to a program, as the compiler reports.
      peak_flops: bf16, a second.
      clock: cycles a second that give this peak (cloud.google.com/tpu/docs).
      megacore: whether two cores act as one device.
      per_host: chips of a whole host along each dimension.
      also: names in other versions of JAX and libtpu.
      devices: JAX devices of one chip.
    """

    device_kind: str
    hbm: int
    peak_flops: float
    clock: float
    megacore: bool
    per_host: tuple[int, ...]
    also: tuple[str, ...] = ()
    devices: int = 1


CHIPS = {
    'v4': Chip('TPU v4', int(30.75 * 2**30), 275e12, 1.05e9, True, (2, 2, 1)),
    'v5e': Chip('TPU v5 lite', int(15.75 * 2**30), 197e12, 1.5e9, False, (2, 2), ('TPU v5e',)),
    'v5p': Chip('TPU v5', int(95.73 * 2**30), 459e12, 1.75e9, True, (2, 2, 1), ('TPU v5p',)),
    'v6e': Chip('TPU v6 lite', int(31.24 * 2**30), 918e12, 1.75e9, False, (2, 2), ('TPU v6e',)),
    'tpu7x': Chip('TPU7x', int(94.75 * 2**30), 1153.5e12, 2.2e9, False, (2, 2, 1), devices=2),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one shape.

    Attributes:
      name: such as v5e:4x4, or 2xv5e:4x4 of two slices.
      chip: of all slices.
      shape: chips of a slice along each dimension.
      slices: their number.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def num_devices(self) -> int:
        """The number of JAX devices of all slices."""
        return self.slices * math.prod(self.shape) * self.chip.devices


def parse(name: str) -> Topology:
    """Returns the topology of a name.

    Raises:
      UserError: an unknown kind of TPU, or another format.
    """
    match = re.fullmatch(r'(?:(\d+)x)?((?:v|tpu)\d\w*):(\d+(?:x\d+)+)', name)
    if match is None or match[2] not in CHIPS:
        raise UserError(f"topology '{name}': write KIND:SHAPE as in v5e:4x4 or 2xv5e:4x4; kinds: {', '.join(CHIPS)}")
    chip, shape = CHIPS[match[2]], tuple(map(int, match[3].split('x')))
    if len(shape) != len(chip.per_host):
        raise UserError(f"topology '{name}': a slice of {match[2]} has {len(chip.per_host)} dimensions")
    for size, host in zip(shape, chip.per_host):
        if size < 1 or size % host and math.prod(shape) != 1:
            raise UserError(f"topology '{name}': a host of {match[2]} has {'x'.join(map(str, chip.per_host))} chips")
    return Topology(name, chip, shape, int(match[1] or 1))


def check(name: str, devices: Sequence[Any]) -> None:
    """Check that the devices of this job are those of the name: count, slices, and kind.

    Raises:
      UserError: they differ.
    """
    expected = parse(name)
    kinds = sorted({device.device_kind for device in devices})
    slices = len({getattr(device, 'slice_index', None) for device in devices})
    same_kind = {*kinds} <= {expected.chip.device_kind, *expected.chip.also}
    if same_kind and len(devices) == expected.num_devices and slices == expected.slices:
        return
    remedy = 'use the mesh/ file of these devices'
    if same_kind and len(devices) * expected.slices == expected.num_devices * slices:
        other = re.sub(r'^\d+x', '', name) if slices == 1 else f'{slices}x{re.sub(r"^[0-9]+x", "", name)}'
        count = 'one such slice' if slices == 1 else f'{slices} such slices'
        remedy = f'of {count} it is --gin.partitioning.Partitioner.topology="\'{other}\'"'
    expected_count, actual_count = _count(expected.num_devices, expected.slices), _count(len(devices), slices)
    raise UserError(
        f"Partitioner.topology = '{name}' is {expected_count} x {expected.chip.device_kind}, and this job has "
        f'{actual_count} x {", ".join(kinds)}; {remedy}'
    )


def _count(devices: int, slices: int) -> str:
    return str(devices) if slices == 1 else f'{devices} in {slices} slices'


def devices(name: str) -> tuple[Any, ...]:
    """Returns devices that programs can be compiled for, but not run on.

    Raises:
      UserError: libtpu is not installed, or has no slice of this shape.
    """
    from jax.experimental import topologies

    topology_ = parse(name)
    options: dict[str, Any] = {'num_slices': topology_.slices} if topology_.slices > 1 else {}
    if topology_.chip.megacore:
        options['chip_config_name'] = 'megacore'
    if math.prod(topology_.shape) == 1:
        options['chips_per_host_bounds'] = (1,) * 3
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(f"topology '{name}': libtpu is not installed: pip install 'perl_jax[plan]'")
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # ask no TPU machine's metadata server
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # compiling does not need exclusive use
    if jax.config.jax_platforms is None:  # pyright: ignore[reportAttributeAccessIssue]  added at run time
        jax.config.update('jax_platforms', 'cpu')
    slice_name = re.sub(r'^\d+x', '', name)
    try:
        with silenced():  # libtpu reports that it found no TPU
            devices_ = topologies.get_topology_desc(platform='tpu', topology_name=slice_name, **options).devices
    except Exception as error:
        raise UserError(f"topology '{name}': {' '.join(str(error).split())}") from error
    return tuple(devices_)
