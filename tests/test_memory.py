"""Memory of a step, against sizes that are known by hand."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from toy_runs import toys  # noqa: F401

from perl_jax import memory

# ruff: noqa: F811 (a fixture is shared by importing it)

KIB = 1024


def test_a_buffer_counts_once_and_no_longer_than_it_lives():
    before = memory.held()
    array = jax.device_put(np.ones(64 * KIB, np.float32))
    view = array.addressable_shards[0].data  # another array over the same buffer
    assert memory.held() - before == 256 * KIB
    del array, view
    assert memory.held() == before


def test_a_program_adds_what_it_gives_but_not_what_it_gives_in_place_of_an_input():
    state, grads = jnp.ones(64 * KIB), jnp.ones(64 * KIB)
    added = []
    for donated in ((), (0,)):
        before = memory.programs()
        kept = jax.jit(lambda s, g: s - g, donate_argnums=donated).lower(state, grads).compile()
        found = memory.measure(before)
        added.append(found['peak'] - found['held'])
        del kept
    assert added == [256 * KIB, 0]


def test_a_program_adds_its_temporaries_and_only_the_largest_counts():
    a, b = jnp.ones((256, 256)), jnp.ones((256, 256))
    products = lambda a, b: jnp.sin(jnp.sin(a @ b) @ jnp.sin(b @ a)).max()  # noqa: E731 (two products live side by side)
    before = memory.programs()
    keep = [jax.jit(f).lower(a, b).compile() for f in (products, lambda a, b: (a + b).sum())]
    found = memory.measure(before)
    assert 2 * 256 * KIB <= found['peak'] - found['held'] <= 4 * 256 * KIB
    later = memory.programs()
    assert memory.measure(later)['peak'] == memory.held()  # none is new
    del keep


def test_a_run_says_it_and_a_full_one_takes_more(toys):
    about = {run: json.loads((getattr(toys, run) / 'run.json').read_text()) for run in ('reward', 'reward_full')}
    held = {run: each['memory']['held'] for run, each in about.items()}
    assert all(each['memory']['peak'] > each['memory']['held'] for each in about.values())
    # Full tuning holds another copy of the weights and, as the optimizer does, a number or more for each of them.
    more = about['reward_full']['trainable_parameters'] - about['reward']['trainable_parameters']
    assert held['reward_full'] - held['reward'] > 4 * more
    # The smaller one holds its base, its adapter and little else.
    assert held['reward'] >= 4 * (about['reward']['base_parameters'] + about['reward']['trainable_parameters'])
