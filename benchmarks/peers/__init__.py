"""One library a file, each with a class `Peer`; here their names and who takes part in what."""

import importlib

from benchmarks.cases import Case
from benchmarks.peers.program import Peer, Settings
from benchmarks.results import BASELINE, DEVICES, FLAX, FLOOR
from seqjax.ops.dispatch import IMPLEMENTATIONS

REFERENCE = "seqjax-scan"
VARIANTS = {"full_lengths": "seqjax-full-lengths", "vmap": "seqjax-vmap"}
"""Group -> what it measures `seqjax` against: seqjax itself, used in another way."""
LIBRARIES = ("torch", "flax-linen", "flax-nnx", "keras", "haiku", "equinox")
ON_DEVICES = (f"{BASELINE}-{DEVICES}", f"flax-linen-{DEVICES}")
"""With a device for each core, beside which the group has PyTorch and Flax on one."""


def names() -> list[str]:
    """Every peer, baseline first: seqjax, its implementations, its variants, the floor, others."""
    implementations = [f"seqjax-{name}" for name in IMPLEMENTATIONS]
    return [BASELINE, *implementations, *VARIANTS.values(), FLOOR, *LIBRARIES, *ON_DEVICES]


def takes_part(name: str, case: Case) -> bool:
    """Whether a case is about this peer at all."""
    if case.group in VARIANTS:
        return name in (BASELINE, VARIANTS[case.group])
    if case.group == DEVICES:
        return name in (BASELINE, "torch", *FLAX, *ON_DEVICES)
    if name == FLOOR:
        return case.group in ("layer", "bidirectional", "decode")
    if case.mode in ("step", "decode"):  # A single step has no implementations.
        return name in (BASELINE, *LIBRARIES)
    return name not in (*VARIANTS.values(), *ON_DEVICES)


def load(name: str, settings: Settings) -> Peer:
    """The peer of that name, its library set up.

    Raises:
      ImportError: the library is not installed.
    """
    libraries = (BASELINE, FLOOR, *LIBRARIES)
    library = next((known for known in libraries if f"{name}-".startswith(f"{known}-")), name)
    variant = name.removeprefix(library).removeprefix("-")
    module = importlib.import_module(f"{__name__}.{library.replace('-', '_')}")
    return module.Peer(settings, variant) if variant else module.Peer(settings)
