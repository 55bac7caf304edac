"""Speed and quality next to named peers: `python -m benchmarks.NAME`."""
