"""Meshes, shardings, topologies and processes."""
