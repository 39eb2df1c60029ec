"""Published limits of the GPUs that kernels are compiled for, and the occupancy that follows from them.

Sources: CUDA C++ Programming Guide, "Compute Capabilities" (8.0 and 9.0); NVIDIA A100 80GB SXM and H100 SXM data
sheets; AMD Instinct MI300X data sheet and the CDNA 3 instruction set guide.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Chip:
    """One GPU as a compile target.

    Args:
        name: how its vendor calls it.
        target: what compilers call it.
        backend, arch, warp_size: the same for Triton.
        bandwidth: published peak of its memory, bytes per second.
        warps: resident warps per multiprocessor (waves per compute unit).
        quarters: schedulers of a multiprocessor; each has its own part of the registers.
        registers: vector registers of one scheduler, per lane of a warp.
        granule: registers per lane are allocated in multiples of this.
        shared: shared memory of a multiprocessor, bytes.
        shared_per_block: most that one block may use, bytes.
        reserved: shared memory the system takes for every block, bytes.
        blocks: resident blocks per multiprocessor.
    """

    name: str
    target: str
    backend: str
    arch: int | str
    warp_size: int
    bandwidth: float
    warps: int
    quarters: int
    registers: int
    granule: int
    shared: int
    shared_per_block: int
    reserved: int
    blocks: int

    def resident_blocks(self, *, registers: int, shared: int, num_warps: int) -> int:
        """Blocks that fit a multiprocessor; 0 where even one does not.

        Args:
            registers: vector registers of a thread.
            shared: shared memory of a block, bytes.
            num_warps: warps of a block.
        """
        if shared > self.shared_per_block:
            return 0
        allocated = -(-max(registers, 1) // self.granule) * self.granule
        warps_by_registers = self.quarters * (self.registers // allocated)
        return min(
            self.blocks,
            min(self.warps, warps_by_registers) // num_warps,
            self.shared // max(shared + self.reserved, 1),
        )

    def occupancy(self, *, registers: int, shared: int, num_warps: int) -> float:
        """Share of the resident warps that the kernel's blocks can fill, 0 to 1."""
        return self.resident_blocks(registers=registers, shared=shared, num_warps=num_warps) * num_warps / self.warps


A100 = Chip(
    name="A100 80GB SXM",
    target="sm_80",
    backend="cuda",
    arch=80,
    warp_size=32,
    bandwidth=2039e9,
    warps=64,
    quarters=4,
    registers=512,
    granule=8,
    shared=164 * 1024,
    shared_per_block=163 * 1024,
    reserved=1024,
    blocks=32,
)
H100 = replace(
    A100,
    name="H100 SXM",
    target="sm_90",
    arch=90,
    bandwidth=3350e9,
    shared=228 * 1024,
    shared_per_block=227 * 1024,
)
MI300X = Chip(
    name="MI300X",
    target="gfx942",
    backend="hip",
    arch="gfx942",
    warp_size=64,
    bandwidth=5300e9,
    warps=32,
    quarters=4,
    registers=512,
    granule=8,
    shared=64 * 1024,
    shared_per_block=64 * 1024,
    reserved=0,
    blocks=32,
)
CHIPS = (A100, H100, MI300X)
