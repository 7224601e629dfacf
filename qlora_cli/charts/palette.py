"""The colours of charts and of their pages, in a light and a dark scheme."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Palette:
    """A colour for each purpose, as `#rrggbb`. A page defines CSS variables of the same names."""

    page: str
    ink: str
    muted: str
    line: str
    first: str
    second: str
    third: str
    host: str
    good: str
    bad: str

    def css(self) -> str:
        """Return the CSS variables."""
        return " ".join(f"--{name}: {color};" for name, color in asdict(self).items())


# No two colours of a palette are equal: an embedded chart is drawn in the light ones, which variables then replace.
LIGHT = Palette(
    page="#ffffff",
    ink="#1f2328",
    muted="#5c6670",
    line="#e3e6e9",
    first="#2f7f8f",
    second="#d9622b",
    third="#6b4fa0",
    host="#7a848e",
    good="#2a8a60",
    bad="#c22f3d",
)
DARK = Palette(
    page="#15181b",
    ink="#e4e7ea",
    muted="#9aa4ae",
    line="#31373d",
    first="#4fa3b3",
    second="#ee8a58",
    third="#bda7ea",
    host="#89939d",
    good="#45b083",
    bad="#ff7b82",
)
