"""Experiments: the small model from nothing but seeds, ladders (chains of recipes), and ablations (matrices of recipes)."""
