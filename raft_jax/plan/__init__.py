"""What a run will take on given chips, from its programs compiled ahead of time for shapes of arrays."""
