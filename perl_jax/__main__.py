"""python -m perl_jax. It has no other code, since gin may import this module a second time."""

import sys

from perl_jax.cli.main import cli

if __name__ == '__main__':
    sys.exit(cli())
