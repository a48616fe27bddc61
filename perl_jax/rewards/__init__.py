"""Reward sources: learned rewards, ensembles, functions of the text."""
