"""TPUs by name."""

import re
import types

import pytest

from perl_jax.errors import UserError
from perl_jax.parallel import topology
from perl_jax.parallel.partitioning import Partitioner


@pytest.mark.parametrize(('name', 'count'), [
    ('v5e:4x4', 16), ('v5e:16x16', 256), ('v6e:2x2', 4), ('v4:2x2x4', 16), ('v5p:4x4x4', 64), ('2xv5e:4x4', 32),
    ('v5e:1x1', 1), ('v4:4x8x8', 256), ('v5p:4x4x8', 128), ('tpu7x:2x2x1', 8), ('tpu7x:4x4x8', 256),
    ('2xtpu7x:2x2x2', 32), ('tpu7x:1x1x1', 2),
])  # fmt: skip
def test_devices_of_a_name(name, count):
    """A chip is a device, on v4 and v5p too, where it has two cores; on Ironwood it is two."""
    wanted, devices = topology.parse(name), topology.devices(name)
    assert wanted.num_devices == len(devices) == count
    assert {d.device_kind for d in devices} == {wanted.chip.device_kind}
    topology.check(name, devices)
    slices = {getattr(d, 'slice_index', None) for d in devices}
    assert len(slices) == wanted.slices


@pytest.mark.parametrize(('name', 'said'), [
    ('v5e', 'write KIND:SHAPE as in v5e:4x4 or 2xv5e:4x4; kinds: v4, v5e, v5p, v6e, tpu7x'),
    ('v9:4x4', 'write KIND:SHAPE'), ('v5e:4x4x4', 'a slice of v5e has 2 dimensions'),
    ('v5e:3x4', 'a host of v5e has 2x2 chips'), ('v4:4x4', 'a slice of v4 has 3 dimensions'),
    ('tpu7x:4x4', 'a slice of tpu7x has 3 dimensions'), ('tpu7x:2x3x1', 'a host of tpu7x has 2x2x1 chips'),
])  # fmt: skip
def test_names_that_are_none(name, said):
    with pytest.raises(UserError, match=re.escape(f"topology '{name}': {said}")):
        topology.parse(name)


def test_the_clock_gives_the_peak():
    """Cycles become seconds by it: each chip's matrix units make so many multiply-adds a cycle."""
    units = {'v4': 8 * 128**2, 'v5e': 4 * 128**2, 'v5p': 8 * 128**2, 'v6e': 4 * 256**2, 'tpu7x': 4 * 256**2}
    for kind, chip in topology.CHIPS.items():
        assert chip.peak_flops == pytest.approx(2 * units[kind] * chip.clock, rel=0.01)


SPELLINGS = {
    'v4:2x2x1': ['TPU v4'], 'v5e:2x2': ['TPU v5e', 'TPU v5 lite'], 'v5p:2x2x1': ['TPU v5p', 'TPU v5'],
    'v6e:2x2': ['TPU v6e', 'TPU v6 lite'], 'tpu7x:2x2x1': ['TPU7x'],
}  # fmt: skip


def job(kind, count, slices=1):
    """Stand-ins for the devices of a job."""
    return [types.SimpleNamespace(device_kind=kind, slice_index=i * slices // count) for i in range(count)]


@pytest.mark.parametrize(('name', 'kind'), [(name, kind) for name, kinds in SPELLINGS.items() for kind in kinds])
def test_every_spelling_of_a_kind_is_known(name, kind):
    topology.check(name, job(kind, topology.parse(name).num_devices))
    for other in SPELLINGS.keys() - {name}:
        with pytest.raises(UserError, match='use the mesh/ file of these devices'):
            topology.check(other, job(kind, topology.parse(other).num_devices))


def test_the_spellings_are_those_that_jax_takes_for_one():
    """JAX's own table has the same two names for a chip, and no other."""
    from jax._src.pallas.mosaic import tpu_info

    for name, kinds in SPELLINGS.items():
        chip = topology.parse(name).chip
        assert {chip.device_kind, *chip.also} == {*kinds}
        assert len({tpu_info.chip_version_from_device_kind(kind) for kind in kinds}) == 1


@pytest.mark.parametrize(('name', 'count', 'slices', 'said'), [
    ('v5e:4x4', 32, 2, 'is 16 x TPU v5 lite, and this job has 32 in 2 slices x TPU v5e; of 2 such slices it is '
     '--gin.partitioning.Partitioner.topology="\'2xv5e:4x4\'"'),
    ('2xv5e:4x4', 16, 1, 'is 32 in 2 slices x TPU v5 lite, and this job has 16 x TPU v5e; of one such slice it is '
     '--gin.partitioning.Partitioner.topology="\'v5e:4x4\'"'),
    ('2xv5e:4x4', 32, 1, 'is 32 in 2 slices x TPU v5 lite, and this job has 32 x TPU v5e; use the mesh/ file'),
    ('v5e:4x8', 32, 2, 'is 32 x TPU v5 lite, and this job has 32 in 2 slices x TPU v5e; use the mesh/ file'),
])  # fmt: skip
def test_slices_are_counted(name, count, slices, said):
    with pytest.raises(UserError, match=re.escape(said)):
        topology.check(name, job('TPU v5e', count, slices))


@pytest.mark.parametrize(('name', 'shape'), [
    ('tpu7x:2x2x2', (1, 16, 1)), ('2xtpu7x:2x2x1', (2, 8, 1)), ('2xv5e:2x2', (2, 4, 1)),
])  # fmt: skip
def test_a_mesh_over_all_devices_with_slices_along_replica(name, shape):
    mesh = Partitioner(topology=name, devices=topology.devices(name)).mesh
    assert mesh.devices.shape == shape
    for replica in mesh.devices:
        assert len({getattr(device, 'slice_index', None) for device in replica.flat}) == 1
