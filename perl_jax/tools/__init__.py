"""What is done with finished runs, and before a run."""
