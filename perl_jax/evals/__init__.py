"""Measuring policies and rewards."""
