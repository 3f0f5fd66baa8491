"""What tests and benchmarks share: small models, an open engine, no GPU needed."""
