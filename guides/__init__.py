"""The zoo's guides: one file a family."""
