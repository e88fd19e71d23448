"""Backdrop on an inference engine: a client that splits, a gateway for clients that cannot, and the engine's settings."""

from .client import Answer, AsyncBackdropClient, BackdropClient
from .frames import FrameSplitter, SplitFrame

__all__ = ["Answer", "AsyncBackdropClient", "BackdropClient", "FrameSplitter", "SplitFrame"]
