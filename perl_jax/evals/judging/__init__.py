"""Judging answers: rubrics, who judges by them, and what the verdicts add up to."""
