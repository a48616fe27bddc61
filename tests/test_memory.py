import json

import jax
import jax.numpy as jnp
from toy_runs import toys  # noqa: F401

from perl_jax.parallel import memory

# ruff: noqa: F811 (a fixture is shared by importing it)

MIB = 2**20


def test_held_counts_every_buffer_once():
    before = memory.live_bytes()
    x = jnp.ones(MIB // 4, jnp.float32)
    same = [x, {'again': x}]
    copy = jax.block_until_ready(jnp.copy(x))
    assert memory.live_bytes() - before == 2 * MIB
    del same, copy
    assert memory.live_bytes() - before == MIB


def test_the_peak_is_that_of_the_largest_new_program():
    x = jax.block_until_ready(jnp.ones((512, 512)))  # 1 MiB
    before = memory.programs()
    step = jax.jit(lambda x, y: (x + y @ y.T @ y @ y.T, (y * y).sum()), donate_argnums=0)
    y = jnp.ones((512, 512))
    x, _ = step(x, y)
    stats = step.lower(x, y).compile().memory_analysis()
    found = memory.measure(before, held := memory.live_bytes())
    adds = stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert stats.alias_size_in_bytes == MIB  # the donated one takes no room of its own
    assert adds >= MIB  # a product has to lie somewhere
    assert found['held'] == held and found['peak'] - held >= adds
    assert memory.measure(memory.programs(), held)['peak'] == held  # nothing new since


def test_a_run_says_it_and_a_full_one_takes_more(toys):
    about = {run: json.loads((getattr(toys, run) / 'run.json').read_text()) for run in ('reward', 'reward_full')}
    held = {run: each['memory']['held'] for run, each in about.items()}
    assert all(each['memory']['peak'] > each['memory']['held'] for each in about.values())
    # Full tuning holds another copy of the weights and, as the optimizer does, a number or more for each of them.
    more = about['reward_full']['trainable_parameters'] - about['reward']['trainable_parameters']
    assert held['reward_full'] - held['reward'] > 4 * more
    # The smaller one holds its base, its adapter and little else.
    assert held['reward'] >= 4 * (about['reward']['base_parameters'] + about['reward']['trainable_parameters'])
