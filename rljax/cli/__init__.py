"""What the command `rljax` does: a module each of its words, over absl flags.

Each defines its flags when it is imported, so a process imports one of them. The files of `launch/` run the same
modules from a clone.
"""
