"""python -m perl_jax. Nothing else happens here: gin may import modules a second time."""

import sys

from perl_jax.cli.main import cli

if __name__ == '__main__':
    sys.exit(cli())
