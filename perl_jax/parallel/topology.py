"""TPUs by name: 'v5e:4x4' is a slice of 16 chips, '2xv5e:4x4' are two such slices; tpu7x has two devices a chip.

Its devices can be had without the hardware: JAX lowers for them and libtpu compiles, on any machine.
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
    """One chip, which is one device of JAX; on Ironwood (tpu7x) it is two, and hbm, peak and clock are of one device.

    device_kind: as libtpu has it; also: as other versions of JAX and libtpu have it.
    hbm: bytes that a program may have, as the compiler says (a little is its own).
    peak_flops: bf16, a second; clock: cycles a second that give this peak (cloud.google.com/tpu/docs).
    per_host: chips of a whole host, along each dimension.
    devices: of JAX, in one chip.
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
    """Slices of one shape."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def num_devices(self) -> int:
        """Devices of JAX in all."""
        return self.slices * math.prod(self.shape) * self.chip.devices


def parse(name: str) -> Topology:
    """The topology of a name.

    Raises:
      UserError: a kind of TPU or a form that is not known.
    """
    found = re.fullmatch(r'(?:(\d+)x)?((?:v|tpu)\d\w*):(\d+(?:x\d+)+)', name)
    if found is None or found[2] not in CHIPS:
        raise UserError(f"topology '{name}': write KIND:SHAPE as in v5e:4x4 or 2xv5e:4x4; kinds: {', '.join(CHIPS)}")
    chip, shape = CHIPS[found[2]], tuple(map(int, found[3].split('x')))
    if len(shape) != len(chip.per_host):
        raise UserError(f"topology '{name}': a slice of {found[2]} has {len(chip.per_host)} dimensions")
    for size, host in zip(shape, chip.per_host):
        if size < 1 or size % host and math.prod(shape) != 1:
            raise UserError(f"topology '{name}': a host of {found[2]} has {'x'.join(map(str, chip.per_host))} chips")
    return Topology(name, chip, shape, int(found[1] or 1))


def check(name: str, devices: Sequence[Any]) -> None:
    """The devices of this job must be those of the name: as many, in as many slices, of a kind by any of its spellings.

    Raises:
      UserError: they are others.
    """
    want = parse(name)
    kinds = sorted({device.device_kind for device in devices})
    slices = len({getattr(device, 'slice_index', None) for device in devices})
    same_kind = {*kinds} <= {want.chip.device_kind, *want.chip.also}
    if same_kind and len(devices) == want.num_devices and slices == want.slices:
        return
    mend = 'give the mesh/ file of these devices'
    if same_kind and len(devices) * want.slices == want.num_devices * slices:
        other = re.sub(r'^\d+x', '', name) if slices == 1 else f'{slices}x{re.sub(r"^[0-9]+x", "", name)}'
        count = 'one such slice' if slices == 1 else f'{slices} such slices'
        mend = f'of {count} it is --gin.partitioning.Partitioner.topology="\'{other}\'"'
    wanted, here = _count(want.num_devices, want.slices), _count(len(devices), slices)
    raise UserError(
        f"Partitioner.topology = '{name}' is {wanted} x {want.chip.device_kind}, and here are "
        f'{here} x {", ".join(kinds)}; {mend}'
    )


def _count(devices: int, slices: int) -> str:
    return str(devices) if slices == 1 else f'{devices} in {slices} slices'


def devices(name: str) -> tuple[Any, ...]:
    """Devices that can be compiled for and nothing else.

    Raises:
      UserError: libtpu is not installed, or knows no slice of this shape.
    """
    from jax.experimental import topologies

    wanted = parse(name)
    options: dict[str, Any] = {'num_slices': wanted.slices} if wanted.slices > 1 else {}
    if wanted.chip.megacore:
        options['chip_config_name'] = 'megacore'
    if math.prod(wanted.shape) == 1:
        options['chips_per_host_bounds'] = (1,) * 3
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(f"topology '{name}': libtpu is not installed: pip install 'perl_jax[plan]'")
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')  # ask no TPU machine's metadata server
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')  # a compiler may run twice on a machine, unlike a chip
    if jax.config.jax_platforms is None:  # pyright: ignore[reportAttributeAccessIssue]  added at run time
        jax.config.update('jax_platforms', 'cpu')
    plain = re.sub(r'^\d+x', '', name)
    try:
        with silenced():  # libtpu writes that it found no TPU
            found = topologies.get_topology_desc(platform='tpu', topology_name=plain, **options).devices
    except Exception as error:
        raise UserError(f"topology '{name}': {' '.join(str(error).split())}") from error
    return tuple(found)
