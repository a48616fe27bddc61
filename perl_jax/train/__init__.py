"""The three trainings, one visible loop each."""
