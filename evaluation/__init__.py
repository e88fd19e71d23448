"""Scores of a model on public benchmarks and on the made scenes."""
