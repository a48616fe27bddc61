"""Gradients of a batch, schedules, and the state that an optimizer steps."""
