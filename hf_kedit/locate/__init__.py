"""Finding out where a model keeps a fact: causal tracing, attribution to neurons, and which layers to edit."""
