"""What exists for the sake of a chip, each behind one call."""
