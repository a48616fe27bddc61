"""Judging answers: rubrics, judges, reading of their replies, win rates."""
