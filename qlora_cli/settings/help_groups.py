"""The groups of flags in help. Imports nothing, for the help that lists all commands."""

from enum import StrEnum


class HelpGroup(StrEnum):
    """The groups of flags in help, in their order."""

    ESSENTIALS = "Essentials"
    DATA = "Data"
    ADAPTER = "Adapter"
    OPTIMIZATION = "Optimization"
    MEMORY = "Memory and speed"
    OUTPUT = "Output"
    RARE = "Rarely needed"
