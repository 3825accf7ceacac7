"""Benchmarks and the tools they need; see each module's ``--help``."""
