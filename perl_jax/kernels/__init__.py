"""What exists for the sake of a chip or of a CPU, each behind one call."""
