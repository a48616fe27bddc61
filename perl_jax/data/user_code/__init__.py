"""The code of tasks, which others write: what it raises, and what tells one version of it from another."""
