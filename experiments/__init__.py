"""Chains and matrices of recipes, and the small model that they make."""
