"""Parts of benchmarks/suite.py: what is registered, tasks, methods, runs, scores, the page."""
