"""What the quality benchmarks share: held-out text, KL divergence by token, paired bootstrap."""
