"""What Linux and XLA have to be told before a program begins, for it to be fast on a CPU.

Memory in pages of 2 MiB: with fewer addresses to look up a step takes about a tenth less time. Linux gives them to
those who ask (`madvise` in ENABLED), and glibc asks if a variable says so when a process starts.

LLVM's level 2 instead of 3: steps are as fast, and all is compiled in about a tenth less time.
"""

from __future__ import annotations

import os
import pathlib
import sys

ENABLED = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
PAGES, FLAGS, LEVEL = 'GLIBC_TUNABLES', 'XLA_FLAGS', 'xla_backend_optimization_level'


def begin() -> None:
    """To be called first by a program, which it may start once more, with the same arguments.

    What a user has set stays: LEVEL among XLA's FLAGS, and PAGES, which may be empty for no. The level is for
    JAX_PLATFORMS=cpu alone. Where the kernel gives large pages to all or to none, there is nothing to ask for.
    """
    if os.environ.get('JAX_PLATFORMS') == 'cpu' and LEVEL not in os.environ.get(FLAGS, ''):
        os.environ[FLAGS] = f'{os.environ.get(FLAGS, "")} --{LEVEL}=2'.strip()
    if PAGES not in os.environ and ENABLED.exists() and '[madvise]' in ENABLED.read_text():
        os.environ[PAGES] = 'glibc.malloc.hugetlb=1'
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
