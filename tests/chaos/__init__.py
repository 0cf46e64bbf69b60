"""Random blows to real processes, and cut and slow links between them: see docs/reliability.md."""
