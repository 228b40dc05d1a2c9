"""What is known of a card: its limits, and the speeds that costs are estimated by."""

import functools
from dataclasses import dataclass
from typing import Any

import torch

KIB = 1024
BY_WARPGROUP = ("sm_90", "sm_100")  # matrix instructions of 64 rows and 4 warps
# Dense matrix FLOPs a clock and SM (CU on AMD): (half, tf32, fp32 without matrix units).
_FLOPS_PER_CLOCK = {
    "sm_80": (2048, 1024, 128),
    "sm_86": (1024, 512, 256),
    "sm_89": (1024, 512, 256),
    "sm_90": (4096, 2048, 256),
    "sm_100": (8192, 4096, 256),
    "sm_120": (1024, 512, 256),
    "gfx942": (2048, 1024, 256),
}
_SHARED = {
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
FAMILIES = tuple(_SHARED)


@dataclass(frozen=True)
class Card:
    """A device as the kernels see it.

    Attributes:
        name: as the driver gives it.
        family: the entry of FAMILIES whose configurations it takes.
        sms: multiprocessors.
        clock_ghz: of the multiprocessors.
        bandwidth_gbs: of the memory, at its peak.
        interpreted: kernels run on the CPU, in Triton's interpreter.

    """

    name: str
    family: str
    sms: int
    clock_ghz: float
    bandwidth_gbs: float
    interpreted: bool = False

    # A launch on a busy stream, and what kernels reach of the two peaks. [calc] for an H100:
    # 700 of 989 TFLOP/s, 3.0 of 3.35 TB/s, see shared/kernels.md; no card of ours confirms them.
    launch_us = 3.0
    reached_flops = 0.7
    reached_bandwidth = 0.9
    l2_speedup = 3.0  # of L2 over the memory, an estimate too
    # Estimates as well: a load's way from a busy memory; and from the last store of a part to the
    # sum of all, by a store, a counter and a load through L2.
    latency_us = 0.8
    arrival_us = 1.5
    fill_us = 1.5  # of a few counters, before the launch

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program may take."""
        return _SHARED[self.family]

    @property
    def few_rows(self) -> int:
        """Rows up to which the regime decode runs; any number in the interpreter, for the tests."""
        return 1 << 30 if self.interpreted else 64

    @property
    def has_descriptors(self) -> bool:
        """Whether tensor descriptors load by a copy engine (TMA) here."""
        return self.interpreted or self.family in ("sm_90", "sm_100", "sm_120")

    @property
    def persists(self) -> bool:
        """Whether the persistent regime runs here: TMA, and room for a launch next to its own."""
        return self.interpreted or self.family in BY_WARPGROUP

    @property
    def joins(self) -> bool:
        """Whether its second launch can start while the first one runs."""
        return self.persists and not self.interpreted

    def join_options(self, R: int) -> dict[str, Any]:
        """Return the options of a launch that joins the one before it.

        Its programs leave registers for the first launch's, which would else be waited for: what
        a program of 128 threads and 40 registers asks for. A larger rank has none to leave.
        """
        options: dict[str, Any] = {"DEPENDENT": self.joins}
        if self.joins:
            options |= {"launch_pdl": True, "maxnreg": 232 if R <= 16 else 255}
        return options

    def flops_per_us(self, kind: str) -> float:
        """Dense FLOPs a microsecond that a good kernel reaches, for kind half, tf32 or fp32."""
        a_clock = _FLOPS_PER_CLOCK[self.family][("half", "tf32", "fp32").index(kind)]
        return a_clock * self.sms * self.clock_ghz * 1e3 * self.reached_flops

    @property
    def bytes_per_us(self) -> float:
        """Bytes a microsecond that a good kernel moves."""
        return self.bandwidth_gbs * 1e3 * self.reached_bandwidth

    def product_options(
        self, kind: str, adapter: torch.dtype, all_registers: bool = False
    ) -> dict[str, Any]:
        """Return the options by which a kernel multiplies: tl.dot's input_precision, registers.

        Halves are exact in either precision. For one block more an SM ptxas would spill a few bytes
        of its own accord around float32 adapters, on sm_100, and where a caller says so: there it
        may take all registers.
        """
        options: dict[str, Any] = {"PRECISION": "ieee" if kind == "fp32" else "tf32"}
        spills = adapter == torch.float32 or all_registers or self.family == "sm_100"
        if spills and self.family != "gfx942":
            options["maxnreg"] = 255
        return options


INTERPRETER = Card("interpreter", "sm_90", 4, 1.0, 100.0, interpreted=True)
# Data sheets, for estimates without a card at hand: benchmarks.gpu.roofline, the tests.
KNOWN = {
    "A100": Card("A100 SXM 80GB", "sm_80", 108, 1.41, 2039),
    "RTX 3090": Card("GeForce RTX 3090", "sm_86", 82, 1.695, 936),
    "L4": Card("L4", "sm_89", 58, 2.04, 300),
    "H100": Card("H100 SXM", "sm_90", 132, 1.83, 3352),
    "B200": Card("B200", "sm_100", 148, 1.85, 8000),
    "RTX 5090": Card("GeForce RTX 5090", "sm_120", 170, 2.407, 1792),
    "MI300X": Card("Instinct MI300X", "gfx942", 304, 2.1, 5300),
}


def family_of(major: int, minor: int) -> str:
    """Return the family of a compute capability: its own, or the nearest that asks no more of it.

    8.7 has sm_80's shared memory; what is newer than this file gets sm_86's tiles and no TMA.
    """
    own = f"sm_{major}{minor}"
    if own in FAMILIES:
        return own
    return {(8, 7): "sm_80", (10, 3): "sm_100", (12, 1): "sm_120"}.get((major, minor), "sm_86")


@functools.cache
def card_of(device: torch.device) -> Card:
    """Return the card, its figures asked from the driver. Once a device; not a synchronisation."""
    if device.type == "cpu":
        return INTERPRETER
    p = torch.cuda.get_device_properties(device)
    family = "gfx942" if torch.version.hip else family_of(p.major, p.minor)
    known = next(card for card in KNOWN.values() if card.family == family)
    # kHz, and bits a transfer of double data rate. A virtual machine's driver may answer 0.
    clock_ghz = getattr(p, "clock_rate", 0) / 1e6 or known.clock_ghz
    pins_bytes = 2 * getattr(p, "memory_bus_width", 0) / 8
    bandwidth_gbs = getattr(p, "memory_clock_rate", 0) * 1e3 * pins_bytes / 1e9
    return Card(
        p.name, family, p.multi_processor_count, clock_ghz, bandwidth_gbs or known.bandwidth_gbs
    )
