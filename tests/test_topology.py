"""TPUs by name."""

import re

import pytest

from perl_jax import topology
from perl_jax.errors import UserError


@pytest.mark.parametrize(('name', 'chips'), [
    ('v5e:4x4', 16), ('v5e:16x16', 256), ('v6e:2x2', 4), ('v4:2x2x4', 16), ('v5p:4x4x4', 64), ('2xv5e:4x4', 32),
    ('v5e:1x1', 1),
])  # fmt: skip
def test_devices_of_a_name(name, chips):
    """A chip is a device, on v4 and v5p too, where it has two cores."""
    wanted, devices = topology.parse(name), topology.devices(name)
    assert wanted.num_devices == len(devices) == chips
    assert {d.device_kind for d in devices} == {wanted.chip.device_kind}
    topology.check(name, devices)
    slices = {getattr(d, 'slice_index', None) for d in devices}
    assert len(slices) == wanted.slices


@pytest.mark.parametrize(('name', 'said'), [
    ('v5e', 'write KIND:SHAPE as in v5e:4x4 or 2xv5e:4x4; kinds: v4, v5e, v5p, v6e'),
    ('v9:4x4', 'write KIND:SHAPE'), ('v5e:4x4x4', 'a slice of v5e has 2 dimensions'),
    ('v5e:3x4', 'a host of v5e has 2x2 chips'), ('v4:4x4', 'a slice of v4 has 3 dimensions'),
])  # fmt: skip
def test_names_that_are_none(name, said):
    with pytest.raises(UserError, match=re.escape(f"topology '{name}': {said}")):
        topology.parse(name)


def test_the_clock_gives_the_peak():
    """Cycles become seconds by it: each chip's matrix units make so many multiply-adds a cycle."""
    units = {'v4': 8 * 128**2, 'v5e': 4 * 128**2, 'v5p': 8 * 128**2, 'v6e': 4 * 256**2}
    for kind, chip in topology.CHIPS.items():
        assert chip.peak_flops == pytest.approx(2 * units[kind] * chip.clock, rel=0.01)
