"""Check whether this machine can train: the installation, the hardware and the hub.

The checks run in a child process (see `isolation`), so that a library that can't be imported, or crashes its process,
is a finding and not the end of the command.
"""
