"""What is computed from answers: metrics, likelihoods, texts, drift, cost, abilities, judges."""
