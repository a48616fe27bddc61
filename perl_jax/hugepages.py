"""Memory in pages of 2 MiB on Linux: with fewer addresses to look up, a step on a CPU takes about a tenth less time.

Linux gives such pages to those who ask (`madvise` in ENABLED); glibc asks if a variable says so when a process starts.
"""

from __future__ import annotations

import os
import pathlib
import sys

ENABLED = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
VARIABLE = 'GLIBC_TUNABLES'


def restart() -> None:
    """Start this program again as one that asks; to be called first. Returns where there is nothing to gain by it.

    That is where the kernel gives them to all or to none, and where VARIABLE is set: by this call the first time, or by
    a user, who has the last word (an empty one is a no).
    """
    if VARIABLE in os.environ or not ENABLED.exists() or '[madvise]' not in ENABLED.read_text():
        return
    os.environ[VARIABLE] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
