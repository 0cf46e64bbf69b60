"""A simulated fleet around the real core: see docs/reliability.md."""
