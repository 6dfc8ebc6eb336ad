"""One library a file, each with a class `Peer`; here their names and who takes part in what."""

import importlib

from benchmarks.cases import Case
from benchmarks.peers.program import Peer, Settings
from benchmarks.results import BASELINE, FLOOR
from seqjax.ops.dispatch import IMPLEMENTATIONS

REFERENCE = "seqjax-scan"
VARIANTS = {"full_lengths": "seqjax-full-lengths", "vmap": "seqjax-vmap"}
"""Group -> what it measures `seqjax` against: seqjax itself, used in another way."""
LIBRARIES = ("torch", "flax-linen", "flax-nnx", "keras", "haiku", "equinox")


def names() -> list[str]:
    """Every peer, baseline first: seqjax, its implementations, its variants, the floor, others."""
    implementations = [f"seqjax-{name}" for name in IMPLEMENTATIONS]
    return [BASELINE, *implementations, *VARIANTS.values(), FLOOR, *LIBRARIES]


def takes_part(name: str, case: Case) -> bool:
    """Whether a case is about this peer at all."""
    if case.group in VARIANTS:
        return name in (BASELINE, VARIANTS[case.group])
    if name == FLOOR:
        return case.group in ("layer", "bidirectional", "decode")
    if case.mode in ("step", "decode"):  # A single step has no implementations.
        return name in (BASELINE, *LIBRARIES)
    return name not in VARIANTS.values()


def load(name: str, settings: Settings) -> Peer:
    """The peer of that name, its library set up.

    Raises:
      ImportError: the library is not installed.
    """
    library, _, variant = (name, "", "") if name in (FLOOR, *LIBRARIES) else name.partition("-")
    module = importlib.import_module(f"{__name__}.{library.replace('-', '_')}")
    return module.Peer(settings, variant) if variant else module.Peer(settings)
