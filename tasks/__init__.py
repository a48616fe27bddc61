"""SeqIO tasks, one module or folder per data set; imported as perl_jax.tasks.NAME and by no other name."""
