"""64-bit digests by which rows are compared: of their tokens, their text and their group.

Each is an 8-byte BLAKE2b digest as a signed integer, so that it fits a column of int64.
"""

import hashlib
import re
import unicodedata

import numpy as np
from numpy.typing import NDArray

# ASCII letters become lower case, digits stay, other ASCII becomes a space; bytes of other characters stay.
PLAIN_BYTES = bytes(ord(chr(code).lower()) if chr(code).isalnum() else ord(" ") for code in range(128)) + bytes(
    range(128, 256)
)
# Punctuation and spaces beyond ASCII: Latin, Arabic, Indic, general, Chinese and full-width ones.
PUNCTUATION = re.compile(
    "[\u00a0-\u00a9\u00ab-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u060c\u061b\u061f\u06d4\u0964\u0965\u2000-\u206f"
    "\u3000-\u3003\u3008-\u3020\u3030\ufe00-\ufe0f\ufeff\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]+"
)


def digest_row(input_ids: NDArray[np.int32], labels: NDArray[np.int32], *, is_desirable: bool | None = None) -> int:
    """Return a digest that is equal for equal rows; those with equal answers differ if one alone is wanted."""
    digest = hashlib.blake2b(input_ids.tobytes(), digest_size=8)
    digest.update(labels.tobytes())
    if is_desirable is not None:
        digest.update(bytes([is_desirable]))
    return _as_number(digest.digest())


def digest_tokens(input_ids: NDArray[np.int32]) -> int:
    """Return a digest that is equal for equal tokens, whatever their labels."""
    return _as_number(hashlib.blake2b(input_ids.tobytes(), digest_size=8).digest())


def digest_text(text: str) -> int:
    """Return a digest that is equal for texts that differ only in case, punctuation, spaces and letter variants."""
    if not text.isascii():
        # Without full-width punctuation most text is normalized already, which NFKC detects quickly.
        text = unicodedata.normalize("NFKC", PUNCTUATION.sub(" ", text.casefold()))
    words = text.encode("utf-8", "surrogatepass").translate(PLAIN_BYTES).split()
    return _as_number(hashlib.blake2b(b" ".join(words), digest_size=8).digest())


def digest_name(name: str) -> int:
    """Return a digest of a name that is never 0."""
    return _as_number(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1


def _as_number(digest: bytes) -> int:
    return int.from_bytes(digest, "little", signed=True)
