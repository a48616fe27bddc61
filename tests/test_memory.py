import jax
import jax.numpy as jnp

from perl_jax import memory

MIB = 2**20


def test_held_counts_every_buffer_once():
    before = memory.held()
    x = jnp.ones(MIB // 4, jnp.float32)
    same = [x, {'again': x}]
    copy = jax.block_until_ready(jnp.copy(x))
    assert memory.held() - before == 2 * MIB
    del same, copy
    assert memory.held() - before == MIB


def test_the_peak_is_that_of_the_largest_new_program():
    x = jax.block_until_ready(jnp.ones((512, 512)))  # 1 MiB
    before = memory.programs()
    step = jax.jit(lambda x, y: (x + y @ y.T @ y @ y.T, (y * y).sum()), donate_argnums=0)
    y = jnp.ones((512, 512))
    x, _ = step(x, y)
    stats = step.lower(x, y).compile().memory_analysis()
    found = memory.measure(before)
    adds = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert stats.alias_size_in_bytes == MIB  # the donated one takes no room of its own
    assert adds >= MIB  # a product has to lie somewhere
    assert found['peak'] - found['held'] >= adds
    assert memory.measure(memory.programs())['peak'] == memory.held()  # nothing new since
