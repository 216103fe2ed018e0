"""Second moments of the inputs of a model's modules: collected, kept, solved with."""
