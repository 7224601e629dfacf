"""llama.cpp's quantizer: where it is looked for, its command, and that a failure leaves no file."""

import importlib
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import gguf
import numpy as np
import pytest

from qlora_cli.errors import ExportError, MissingDependencyError
from qlora_cli.merging.exports.gguf import GgufFormat
from qlora_cli.merging.exports.llama_cpp import quantizer as quantizing
from qlora_cli.merging.exports.llama_cpp.converter import VARIABLE
from qlora_cli.merging.exports.llama_cpp.gguf_file import read_gguf
from qlora_cli.merging.exports.llama_cpp.quantizer import CONVERTED, PROGRAM, Quantizer, find_quantizer, quantize
from qlora_cli.settings.choices import ExportFormat, GgufType
from qlora_cli.settings.models import MergeCommandSettings, MergeSettings

STAND_IN = Path(__file__).parents[2] / "support" / "runs" / "gguf_converter.py"


@pytest.fixture(autouse=True)
def _no_quantizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(quantizing, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path / "site")]))


def program(directory: Path, code: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / PROGRAM
    path.write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
    path.chmod(0o755)
    return path


def package(directory: Path, module: str) -> None:
    folder = directory / "site" / "llama_cpp"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / module).touch()
    importlib.invalidate_caches()


def start(llama_cpp: Path | None = None) -> list[str]:
    found = find_quantizer(llama_cpp, GgufType.Q4_K_M)
    assert found is not None
    return list(found.start)


def test_a_named_checkout_precedes_the_library_and_that_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_path = program(tmp_path / "bin")
    assert start() == [str(on_path)]
    package(tmp_path, "llama_cpp.py")
    assert start()[0] == sys.executable
    assert start()[-1] == "quantize"
    built, named = program(tmp_path / "env" / "build" / "bin"), program(tmp_path / "named" / "bin")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "env"))
    assert start() == [str(built)]
    (tmp_path / "named" / "convert_hf_to_gguf.py").touch()
    assert start(tmp_path / "named") == start(tmp_path / "named" / "convert_hf_to_gguf.py") == [str(named)]
    assert start(tmp_path / "site")[0] == sys.executable  # a checkout in which nothing was compiled


def test_another_package_of_that_name_is_not_it(tmp_path: Path) -> None:
    package(tmp_path, "gguf.py")
    with pytest.raises(
        MissingDependencyError, match=r"gguf_type: q4_k_m needs llama.cpp's quantizer, which is not"
    ) as caught:
        start()
    assert 'pip install "qlora-cli[llama-cpp]"' in str(caught.value.hint)
    assert f"{PROGRAM} on the PATH" in str(caught.value.hint)
    assert caught.value.exit_code == 2


def test_types_that_the_converter_writes_need_none() -> None:
    assert [outtype for outtype in GgufType if outtype not in CONVERTED and _is_found(outtype)] == []
    assert {find_quantizer(None, outtype) for outtype in CONVERTED} == {None}


def _is_found(outtype: GgufType) -> bool:
    try:
        return find_quantizer(None, outtype) is not None
    except MissingDependencyError:
        return False


def test_the_command_names_files_and_type(tmp_path: Path) -> None:
    command = Quantizer(start=["q"]).command(tmp_path / "a b.gguf", tmp_path / "c.gguf", GgufType.IQ4_XS)
    assert command == ["q", str(tmp_path / "a b.gguf"), str(tmp_path / "c.gguf"), "IQ4_XS"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; open(sys.argv[2], 'w').write('half'); sys.exit('no luck')", "exit code 1; .*\n.*no luck"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("", "exit code 0; .*\n.*wrote nothing"),
    ],
)
def test_a_failure_is_described_and_leaves_no_file(tmp_path: Path, code: str, message: str) -> None:
    target = tmp_path / "a.gguf"
    with pytest.raises(ExportError, match=message) as caught:
        quantize(Quantizer(start=[str(program(tmp_path, code))]), tmp_path / "b.gguf", target, GgufType.Q6_K)
    assert not target.exists()
    assert "--gguf-type" in str(caught.value.hint)


def test_matrices_whose_rows_are_no_whole_blocks_are_counted(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_token_list(["a", "b"])
    kinds = gguf.GGMLQuantizationType
    for name, row, kind in (
        ("token_embd", 576, kinds.Q8_0),
        ("blk.0.a", 512, kinds.Q4_0),
        ("blk.0.b", 64, kinds.Q5_0),
    ):
        values = gguf.quants.quantize(np.zeros((2, row), dtype=np.float32), kind)
        writer.add_tensor(f"{name}.weight", values, raw_dtype=kind)
    writer.add_tensor("blk.0.norm.weight", np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = read_gguf(tmp_path / "a.gguf")
    num_weights = 2 * (576 + 512 + 64) + 4
    bits = (2 * (576 * 8.5 + 512 * 4.5 + 64 * 5.5) + 4 * 32) / num_weights
    assert facts.bits_per_weight == pytest.approx(bits)
    message = facts.in_other_types(256)
    assert message is not None
    assert message.startswith("2 of 3 matrices have rows that are no multiple of 256 weights")
    assert message.endswith(f"are stored in Q5_0 and Q8_0: {bits:.2f} bits a weight on average")
    assert facts.in_other_types(64) is None


@pytest.mark.parametrize(
    ("outtype", "share", "to"),
    [
        (GgufType.AUTO, 1.0, None),
        (GgufType.F32, 2.0, None),
        (GgufType.Q8_0, 1.0, "Q8_0"),
        (GgufType.Q4_K_M, 1.53125, "Q4_K_M"),  # the file in 16 bit, and one that is at most in Q8_0
    ],
)
def test_the_disk_space_includes_the_file_that_is_quantized(
    tmp_path: Path, outtype: GgufType, share: float, to: str | None
) -> None:
    program(tmp_path / "bin")
    merge = MergeSettings(adapters=("run",), formats=(ExportFormat.GGUF,), llama_cpp=STAND_IN, gguf_type=outtype)
    made = GgufFormat(MergeCommandSettings(merge=merge))
    assert (made.share, made.quantized_to) == (share, to)
    assert quantizing.has_library() is False
