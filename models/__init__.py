"""The zoo's models: one file a generative story."""
