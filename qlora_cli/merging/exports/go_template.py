"""Write the turns of a chat template in Go's template language, for a Modelfile.

No action has a trim marker (`{{-`): white space around turns is preserved, as in training.
"""

import re

from qlora_cli.merging.exports.template_turns import ASSISTANT, SYSTEM, USER, SystemPosition, Turns

HAS_SYSTEM = '(eq (index $.Messages 0).Role "system")'
IS_LAST = "(eq (len (slice $.Messages $i)) 1)"
# What Go's parser, or that of Modelfiles, would interpret. The latter also drops unprintable characters.
SPECIAL = re.compile(r'\{{2,}|\{$|"{3,}')


def go_template(turns: Turns) -> str:
    """Return the TEMPLATE that renders the same as `turns.render`."""
    system = (
        "" if turns.system_position in {SystemPosition.NOWHERE, SystemPosition.LAST_USER} else _turn(turns, SYSTEM)
    )
    roles = [
        *([("system", system)] if system else []),
        ("user", _user(turns)),
        ("assistant", _answer(turns)),
    ]
    branches = "{{ else if ".join(f'eq .Role "{role}" }}}}{text}' for role, text in roles)
    return (
        f"{literal(turns.opening)}{{{{ range $i, $_ := .Messages }}}}{_default(turns)}"
        f"{{{{ if {branches}{{{{ end }}}}{{{{ end }}}}"
    )


def _default(turns: Turns) -> str:
    return _when('and (eq $i 0) (ne .Role "system")', literal(turns.default))


def _turn(turns: Turns, role: str) -> str:
    return literal(turns.before[role]) + "{{ .Content }}" + literal(turns.after[role])


def _user(turns: Turns) -> str:
    before = literal(turns.before[USER])
    if turns.system_position == SystemPosition.FIRST_USER:  # the system message has already begun this turn
        before = _when(f"not (and (eq $i 1) {HAS_SYSTEM})", before)
    elif turns.system_position == SystemPosition.LAST_USER:
        text = f"{literal(turns.before[SYSTEM])}{{{{ (index $.Messages 0).Content }}}}{literal(turns.after[SYSTEM])}"
        before += _when(f"and {IS_LAST} {HAS_SYSTEM}", text)
    after = literal(turns.after[USER]) + _when(IS_LAST, literal(turns.generation))
    return before + "{{ .Content }}" + after


def _answer(turns: Turns) -> str:
    after = _when(f"not {IS_LAST}", literal(turns.after[ASSISTANT]))
    return literal(turns.before[ASSISTANT]) + "{{ .Content }}" + after


def _when(condition: str, text: str) -> str:
    return f"{{{{ if {condition} }}}}{text}{{{{ end }}}}" if text else ""


def literal(text: str) -> str:
    """Return `text` as a literal in a template: unchanged, except for what would be interpreted."""
    return re.sub(r"[^\n]+", lambda line: _line(line[0]), text)


def _line(text: str) -> str:
    escaped = SPECIAL.sub(lambda match: _string(match[0]), text)
    return "".join(char if char.isprintable() else _string(char) for char in escaped)


def _string(text: str) -> str:
    """Return an action that writes `text` with each character escaped, so that no quote or brace is left in it."""
    return '{{ "' + "".join(f"\\U{ord(char):08x}" for char in text) + '" }}'
