"""Write, fit and trust variational autoencoders as Pyro programs."""
