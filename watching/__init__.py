"""Watching a camera: frames from a source, questions about them, and where the answers go (`backdrop watch`)."""
