"""A user's own rows as a task, without code: which columns mean what, and how they become texts."""
