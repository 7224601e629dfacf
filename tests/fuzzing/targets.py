"""Every target, by name; to add one, write a module next to this one, and a line here."""

from tests.fuzzing.chat_templates import CHAT
from tests.fuzzing.checkpoints import CHECKPOINT
from tests.fuzzing.data_files import ARROW, PARQUET, TEXT
from tests.fuzzing.frame import Target
from tests.fuzzing.model_files import ADAPTER, HEADER
from tests.fuzzing.run_files import METRICS, RECORD
from tests.fuzzing.settings_files import SETTINGS

ALL = (ARROW, PARQUET, TEXT, SETTINGS, CHAT, HEADER, ADAPTER, RECORD, METRICS, CHECKPOINT)
TARGETS: dict[str, Target] = {target.name: target for target in ALL}
