"""Backdrop: a LLaVA-style vision-language model that reuses the background across images."""

__version__ = "0.1.0"
