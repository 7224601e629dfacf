"""Every target, by name; one more is a module beside this one, and a line here."""

from tests.fuzzing.chat_templates import CHAT
from tests.fuzzing.data_files import ARROW, PARQUET, TEXT
from tests.fuzzing.frame import Target
from tests.fuzzing.settings_files import SETTINGS

TARGETS: dict[str, Target] = {target.name: target for target in (ARROW, PARQUET, TEXT, SETTINGS, CHAT)}
