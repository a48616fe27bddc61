"""perl_jax: PERL (parameter efficient reinforcement learning from human feedback) in JAX."""

__version__ = '0.1.0'
