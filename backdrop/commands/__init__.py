"""The sub-commands of `backdrop`: each a thin function that reads arguments, calls a room's function and prints what came of it.

What takes long to import is imported inside the functions, so that `backdrop --help` is there at once.
"""
