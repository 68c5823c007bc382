"""How the models of the zoo are made: one file a model, what they share in `base`."""
