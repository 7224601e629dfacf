"""Whether this machine can train: what is installed, what the hardware does, what the hub answers.

The checks run in a child process (see `isolation`), so that a library that can't be imported, or that takes its
process down, is a finding and not the end of the command.
"""
