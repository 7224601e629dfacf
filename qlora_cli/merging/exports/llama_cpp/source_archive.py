"""llama.cpp's conversion scripts out of the source archive of llama-cpp-python, which is on PyPI and carries them.

No package installs them. One version is pinned by its digest; it is downloaded once, and only what conversion needs is
unpacked, into the cache. Imports no torch.
"""

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # lazy there

from qlora_cli.cache import cache_folder
from qlora_cli.errors import MissingDependencyError
from qlora_cli.events import BytesDone, PhaseStarted, Reporter
from qlora_cli.units import format_bytes
from qlora_cli.writing import clear_leftovers, private_folder, publish_directory, staging

CLONE = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"
SUFFIX = ".tar.gz"
CHECKOUT = "vendor/llama.cpp/"  # in the archive's only folder
NEEDED = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/", "gguf-py/gguf/", "LICENSE")
TIMEOUT_SECONDS = 30.0
PIECE_BYTES = 1024**2


@dataclass(frozen=True, kw_only=True)
class SourceArchive:
    """A source archive by its address, the SHA-256 of its bytes, and their number."""

    url: str
    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return self.url.rpartition("/")[2]

    @property
    def checkout(self) -> Path:
        """The folder in the cache that its scripts are unpacked into; it is complete or absent."""
        return cache_folder("llama_cpp") / self.sha256

    def check_available(self) -> None:
        """Check that it is unpacked, or may be downloaded.

        Raises:
            MissingDependencyError: it would have to be downloaded, and HF_HUB_OFFLINE forbids it.
        """
        if not self.checkout.is_dir() and constants.HF_HUB_OFFLINE:
            raise self._missing("llama.cpp's converter has to be downloaded once, and HF_HUB_OFFLINE=1 is set")

    def unpack(self, file: Path | None, reporter: Reporter) -> None:
        """Unpack its scripts into the cache, unless they are there: from `file`, or else from the network.

        Raises:
            MissingDependencyError: it can't be downloaded, read or unpacked, or is another file.
        """
        if file is not None:
            self._check_digest(file, str(file))
        if self.checkout.is_dir():
            return
        try:
            folder = private_folder(self.checkout.parent)
            clear_leftovers(folder, self.checkout.name)
            with staging(self.checkout) as staged:
                archive = file or self._download(staged / self.name, reporter)
                reporter.report(PhaseStarted(title="Unpacking llama.cpp's converter"))
                _extract(archive, staged / "unpacked")
                publish_directory(staged / "unpacked", self.checkout)
        except (OSError, tarfile.TarError) as error:
            if isinstance(error, MissingDependencyError):
                raise
            raise self._missing(
                f"llama.cpp's converter can't be unpacked in {self.checkout.parent}: {error}"
            ) from error

    def _download(self, target: Path, reporter: Reporter) -> Path:
        title = f"Downloading llama.cpp's converter ({format_bytes(self.num_bytes)}, once)"
        reporter.report(PhaseStarted(title=title))
        try:
            with httpx.stream("GET", self.url, follow_redirects=True, timeout=TIMEOUT_SECONDS) as answer:
                answer.raise_for_status()
                done = 0
                with target.open("xb") as file:
                    for piece in answer.iter_bytes(PIECE_BYTES):
                        done += file.write(piece)
                        if done > self.num_bytes:
                            break
                        reporter.report(BytesDone(kind="download", done_bytes=done, total_bytes=self.num_bytes))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            what = str(error).partition("\n")[0] or type(error).__name__
            raise self._missing(f"llama.cpp's converter can't be downloaded from {self.url}: {what}") from error
        self._check_digest(target, f"what was downloaded from {self.url}")
        return target

    def _check_digest(self, file: Path, named: str) -> None:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise self._missing(f"{named} can't be read: {error.strerror}") from error
        if digest != self.sha256:
            raise self._missing(f"{named} is not the pinned {self.name}: its SHA-256 is {digest}, not {self.sha256}")

    def _missing(self, message: str) -> MissingDependencyError:
        return MissingDependencyError(
            message,
            hint=f"Download {self.url} elsewhere and give it as --llama-cpp {self.name}; or run: {CLONE}, "
            "and give --llama-cpp llama.cpp.",
            setting="merge.formats",
        )


PINNED = SourceArchive(
    url="https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz",
    sha256="832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
    num_bytes=76_589_250,
)


def _extract(archive: Path, target: Path) -> None:
    """Extract what conversion needs of llama.cpp into `target`.

    Raises:
        tarfile.TarError: it is not such an archive, holds none of it, or a member would land elsewhere.
    """
    with tarfile.open(archive, "r:gz") as opened:
        for member in _needed(opened):
            opened.extract(member, target, filter="data")
    if not target.is_dir():
        raise tarfile.TarError(f"it holds no {CHECKOUT}")


def _needed(opened: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the files that conversion needs, named as in a checkout."""
    for member in opened:
        name = member.name.partition("/")[2]
        inside = name.removeprefix(CHECKOUT)
        if member.isfile() and inside != name and inside.startswith(NEEDED):
            yield member.replace(name=inside, deep=False)
