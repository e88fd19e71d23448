"""Benchmarks of Backdrop against transformers' own LLaVA."""
