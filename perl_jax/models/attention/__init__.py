"""Attention: of queries to segments of keys, in packed sequences of a prompt and its branches; and positions."""
