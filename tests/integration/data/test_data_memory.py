"""A file larger than the allowed memory is prepared."""

import json
import resource
from pathlib import Path

from tests.support.processes.plain_python import PlainPython

FILE_MIB, ALLOWED_MIB = 64, 60
PREPARE = """
import json, resource, sys
from qlora_cli.data.tokenizing.encode import TextTokenizer
from qlora_cli.data.feeding.prepare import prepare_data
from qlora_cli.events import SilentReporter
from qlora_cli.tokenizing.text_interface import load_text_interface
from qlora_cli.settings.models import DataSettings, ModelSettings
file, model, allowed = sys.argv[1], sys.argv[2], int(sys.argv[3])
side = load_text_interface(ModelSettings(name=model), SilentReporter(), max_length=None)
text = TextTokenizer(tokenizer=side.tokenizer.tokenizer, end_ids=side.tokenizer.end_ids, reporter=SilentReporter())
(used,) = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")]
limit = (used << 10) + (allowed << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    open(file, "rb").read()
except MemoryError:
    print("the file is larger than the limit", file=sys.stderr)
data = prepare_data(DataSettings(dataset=(file,), max_length=512, accept_lost=True), text, seed=0)
print(json.dumps({"rows": data.train.report.rows, "last": data.train.dataset[-1]["input_ids"][-1]}))
"""


def test_a_file_larger_than_the_allowed_memory_is_prepared(
    plain_python: PlainPython, base_model: Path, tmp_path: Path
) -> None:
    assert hasattr(resource, "RLIMIT_DATA")
    file, num_rows = tmp_path / "large.jsonl", 0
    ids = [10 + number % 3000 for number in range(499)]
    beginning = json.dumps(ids)[:-1]
    with file.open("w", encoding="utf-8") as lines:
        while lines.tell() < FILE_MIB << 20:
            lines.write("".join(f'{{"input_ids": {beginning}, {(num_rows + i) % 3000}]}}\n' for i in range(1000)))
            num_rows += 1000
    done = plain_python(PREPARE, file, base_model, ALLOWED_MIB)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "the file is larger than the limit" in done.stderr
    assert json.loads(done.stdout) == {"rows": num_rows, "last": (num_rows - 1) % 3000}
