"""What the package costs, as ratios; ``python -m benchmarks`` runs all parts and writes ``RESULTS.md``."""
