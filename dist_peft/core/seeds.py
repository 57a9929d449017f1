"""Seeds of random generators, derived from a run's seed and the place where they are used."""

import hashlib

__all__ = ["derive_seed"]


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed from printable parts: the same in every process, on every platform."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
