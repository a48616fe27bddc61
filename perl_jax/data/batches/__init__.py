"""From rows in memory to batches: batch n is a function of (seed, n)."""
