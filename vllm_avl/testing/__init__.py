"""What tests, benchmarks and the demo share: small models and pictures."""
