"""Side-by-side measurements: ours against Pyro, PyTorch by hand, NumPyro and pythae.

Every figure is a ratio of contenders that ran in one process, interleaved, after they were found to
compute the same thing. ``make bench`` runs them in an environment that has all contenders.
"""
