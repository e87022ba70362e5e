"""The shadow_* masks: which bits of an SPTE mean what, as KVM sets them up when it loads.

KVM has one set of these masks, global for all VMs (arch/x86/kvm/mmu/spte.c).  The common module makes those of shadow
paging, which are those of AMD's NPT too; kvm_intel then replaces most of them when it uses EPT:

                    shadow, NPT                 EPT
    user            bit 2                       bit 0 (readable)
    accessed        bit 5                       bit 8
    dirty           bit 6                       bit 9
    nx, x           nx: bit 63                  x: bit 2
    present         bit 0                       bit 0 (none with execute-only), bit 63 (suppress #VE)
    acc_track       none                        bits 2:0
    host_writable   bit 9                       bit 57
    mmu_writable    bit 10                      bit 58
    mmio            bits 51 and 0, access 2:1   bits 2:0 = 110b

Source: kernel arch/x86/kvm/mmu/spte.c and spte.h @v6.18, and the same files of 6.1, 6.9, 6.10, 6.11, 6.12, 6.13 and
6.14 for what changed; see `CHANGES`.  Those of 6.15 to 6.17 were not at hand: what is dated 6.16 is in 6.18 and not in
6.14, and came with TDX.
"""

from __future__ import annotations

from ..arch.number import number
from ..errors import ArgumentError, ArgumentTypeError
from ..value import Value

__all__ = [
    "CHANGES",
    "KINDS",
    "NEWEST",
    "OLDEST",
    "SPTE_MMIO_ALLOWED_MASK",
    "ShadowMasks",
    "kernel_version",
    "reset_all_pte_masks",
]

OLDEST, NEWEST = (6, 1), (6, 18)
"""The kernels whose rules are known here, both included."""

KINDS = ("shadow", "npt", "ept")

# What changed in between, and in which kernel first.
_NONPRESENT_VALUE = (6, 10)
_AD_ENABLED = (6, 13)
_NO_MEMTYPE_MASK = (6, 16)
_VM_MMIO_VALUE = (6, 10)

CHANGES = (
    ("6.10", "SHADOW_NONPRESENT_VALUE is bit 63, no longer 0; a removed SPTE has that bit too"),
    ("6.10", "EPT: present_mask and mmio_mask have bit 63, suppress #VE"),
    ("6.10", "the MMIO value is also kept per VM, in kvm->arch.shadow_mmio_value (6.16: kvm_mmu_set_mmio_spte_value)"),
    ("6.11", "REMOVED_SPTE became FROZEN_SPTE and shadow_phys_bits kvm_host.maxphyaddr: the same numbers"),
    ("6.13", "kvm_ad_enabled says whether A/D bits are used; EPT: accessed_mask, dirty_mask are set without them too"),
    ("6.16", "shadow_memtype_mask is gone: what is asked is whether the vendor module has get_mt_mask"),
)
"""(kernel, what changed with it) from `OLDEST` to `NEWEST`, oldest first: by the sources, but 6.16 (see above)."""

# Bits of a page-table entry and of an EPT entry (arch/x86/kvm/mmu.h, arch/x86/include/asm/vmx.h).
_P, _W, _U = 1 << 0, 1 << 1, 1 << 2
_A, _D, _NX = 1 << 5, 1 << 6, 1 << 63
_EPT_R, _EPT_W, _EPT_X, _EPT_RWX = 1 << 0, 1 << 1, 1 << 2, 7
_EPT_MT, _EPT_IPAT = 7 << 3, 1 << 6
_EPT_A, _EPT_D, _EPT_SUPPRESS_VE = 1 << 8, 1 << 9, 1 << 63
_EPT_MISCONFIG_WX = _EPT_W | _EPT_X

_L1TF_LEN = 5  # SHADOW_NONPRESENT_OR_RSVD_MASK_LEN
_FROZEN_LOW = 0x5A0

SPTE_MMIO_ALLOWED_MASK = 1 << 63 | (1 << 52) - (1 << 12) | 7
"""What the mask of MMIO SPTEs may have: bit 63, bits 51:12, bits 2:0; the rest is the generation's, and bit 11."""


def kernel_version(text: str, call: str = "kernel_version") -> tuple[int, int]:
    """(6, 18) of "6.18", "6.18.44" or "6.18.44-fc".  ArgumentError unless it is one from `OLDEST` to `NEWEST`."""
    accepted = f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    if not isinstance(text, str):
        raise ArgumentTypeError(call, "version", text, "a str as '6.18'")
    major, _, rest = text.partition(".")
    minor = rest.partition(".")[0].partition("-")[0]
    if not (major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise ArgumentError(call, "version", text, accepted)
    found = int(major), int(minor)
    if not OLDEST <= found <= NEWEST:
        raise ArgumentError(call, "version", text, accepted, "the rules of other kernels are not known here")
    return found


def _bits(low: int, high: int) -> int:
    # Bits low to high, both included.
    return (1 << high + 1) - (1 << low)


class ShadowMasks(Value):
    """The masks of one loaded KVM.  Made by `reset_all_pte_masks`; a method gives those after a call of its name.

    The fields are the kernel's globals without `shadow_`; `kind` and `version` ("6.18") say whose they are.
    `nonpresent_value` is SHADOW_NONPRESENT_VALUE and `frozen_spte` FROZEN_SPTE.  `maxphyaddr` is the width that CPUID
    says, `x86_phys_bits` that width without the bits of an encryption key.  `mmio_caching` is what the module parameter
    was loaded with, `enable_mmio_caching` what it reads as now.  `has_mt_mask`: the vendor module puts a memory type
    into each leaf.  `memtype_mask` is 0 where the kernel has none (from 6.16).  `warnings` are the refusals on the way,
    in words: each is a WARN of the kernel.
    """

    kind: str
    version: str
    kvm_ad_enabled: bool
    user_mask: int
    accessed_mask: int
    dirty_mask: int
    nx_mask: int
    x_mask: int
    present_mask: int
    acc_track_mask: int
    me_value: int
    me_mask: int
    host_writable_mask: int
    mmu_writable_mask: int
    mmio_value: int
    mmio_mask: int
    mmio_access_mask: int
    memtype_mask: int
    nonpresent_or_rsvd_mask: int
    nonpresent_or_rsvd_lower_gfn_mask: int
    nonpresent_value: int
    has_mt_mask: bool
    mmio_caching: bool
    enable_mmio_caching: bool
    maxphyaddr: int
    x86_phys_bits: int
    warnings: tuple[str, ...] = ()

    @property
    def frozen_spte(self) -> int:
        """The value of an SPTE that the TDP MMU is changing in several steps: FROZEN_SPTE (to 6.10: REMOVED_SPTE)."""
        return self.nonpresent_value | _FROZEN_LOW

    def replace(self, **fields: object) -> ShadowMasks:
        """The same masks with these fields changed; nothing is checked.  TypeError for a field there is not."""
        values: dict[str, object] = {name: getattr(self, name) for name in self.fields()}
        return ShadowMasks(**{**values, **fields})  # type: ignore[arg-type]

    def set_mmio_spte_mask(self, value: int, mask: int, access: int) -> ShadowMasks:
        """The masks after kvm_mmu_set_mmio_spte_mask(value, mask, access): how SPTEs of emulated MMIO look.

        The value becomes 0, and MMIO caching is off, where the module parameter mmio_caching was off (no warning), and
        with a warning where

        - the mask has bits beside 63, 51:12 and 2:0;
        - the value overlaps the five bits above the L1TF mask, to which it moves bits of the address;
        - the value has bits outside the mask;
        - a frozen SPTE under the mask reads as the value.

        A value that overlaps the low bits of the address warns and stays.  ArgumentError: an argument that is not of 64
        bits; an `access` of more than 32, on which the kernel stops (BUG_ON).
        """
        call = "set_mmio_spte_mask"
        value, mask = number(call, "value", value), number(call, "mask", mask)
        access = number(call, "access", access, (1 << 32) - 1)
        warned = []
        if value & self.nonpresent_or_rsvd_lower_gfn_mask:
            over = value & self.nonpresent_or_rsvd_lower_gfn_mask
            warned.append(f"MMIO value {value:#x} has bits {over:#x} of the address of the page")
        if not self.mmio_caching:
            value = 0
        off = ": MMIO caching is off"
        if mask & ~SPTE_MMIO_ALLOWED_MASK:
            beside = mask & ~SPTE_MMIO_ALLOWED_MASK
            warned.append(f"MMIO mask {mask:#x} has bits {beside:#x} beside 63, 51:12 and 2:0{off}")
            value = 0
        moved = self.nonpresent_or_rsvd_mask << _L1TF_LEN
        if value & moved:
            to = f"{moved:#x}, where L1TF's mask moves bits of the address to"
            warned.append(f"MMIO value {value:#x} overlaps {to}{off}")
            value = 0
        if value & mask != value:
            warned.append(f"MMIO value {value:#x} has bits outside its mask {mask:#x}{off}")
            value = 0
        if value and self.frozen_spte & mask == value:
            warned.append(f"MMIO value {value:#x} is what a frozen SPTE {self.frozen_spte:#x} reads as{off}")
            value = 0
        return self.replace(
            mmio_value=value,
            mmio_mask=mask,
            mmio_access_mask=access,
            enable_mmio_caching=value != 0,
            warnings=(*self.warnings, *warned),
        )

    def set_mmio_spte_value(self, value: int) -> ShadowMasks:
        """The masks as a VM sees them after kvm_mmu_set_mmio_spte_value(kvm, value): a value of its own, as TDX has.

        ArgumentError before 6.10, where every VM has the global value.
        """
        call = "set_mmio_spte_value"
        if kernel_version(self.version) < _VM_MMIO_VALUE:
            raise ArgumentError(call, "version", self.version, "6.10 or later", "there is one value for all VMs")
        return self.replace(mmio_value=number(call, "value", value))

    def set_me_spte_mask(self, value: int, mask: int) -> ShadowMasks:
        """The masks after kvm_mmu_set_me_spte_mask(value, mask): memory encryption.

        `value` is set in each SPTE (AMD's C-bit), `mask` has all bits that may be (also Intel's key bits).  A value
        with bits outside the mask makes both 0, with a warning.  ArgumentError: an argument that is not of 64 bits.
        """
        call = "set_me_spte_mask"
        value, mask = number(call, "value", value), number(call, "mask", mask)
        warned = self.warnings
        if value & ~mask:
            warned = (*warned, f"encryption value {value:#x} has bits outside its mask {mask:#x}: both are 0")
            value = mask = 0
        return self.replace(me_value=value, me_mask=mask, warnings=warned)

    def set_ept_masks(self, has_ad_bits: bool, has_exec_only: bool) -> ShadowMasks:
        """The masks after kvm_mmu_set_ept_masks: kvm_intel with EPT.

        `has_ad_bits`: the processor has A/D bits in EPT and kvm_intel's parameter eptad is on.  `has_exec_only`: an
        entry may be executable and nothing else.  The masks of encryption stay.
        """
        version = kernel_version(self.version)
        ad = bool(has_ad_bits)
        set_anyway = ad or version >= _AD_ENABLED
        suppress_ve = _EPT_SUPPRESS_VE if version >= _NONPRESENT_VALUE else 0
        made = self.replace(
            kind="ept",
            kvm_ad_enabled=ad,
            user_mask=_EPT_R,
            accessed_mask=_EPT_A if set_anyway else 0,
            dirty_mask=_EPT_D if set_anyway else 0,
            nx_mask=0,
            x_mask=_EPT_X,
            present_mask=(0 if has_exec_only else _EPT_R) | suppress_ve,
            acc_track_mask=_EPT_RWX,
            memtype_mask=_EPT_MT | _EPT_IPAT if version < _NO_MEMTYPE_MASK else 0,
            has_mt_mask=True,
            host_writable_mask=1 << 57,
            mmu_writable_mask=1 << 58,
        )
        return made.set_mmio_spte_mask(_EPT_MISCONFIG_WX, _EPT_RWX | suppress_ve, 0)


def reset_all_pte_masks(
    phys_bits: int,
    *,
    x86_phys_bits: int | None = None,
    l1tf: bool = False,
    cache_bits: int | None = None,
    mmio_caching: bool = True,
    npt: bool = False,
    version: str = "6.18",
) -> ShadowMasks:
    """The masks after kvm_mmu_reset_all_pte_masks: those of shadow paging, and of NPT, which has the same.

    `phys_bits` is the processor's MAXPHYADDR (CPUID 0x80000008 EAX 7:0), 32 to 52.  `x86_phys_bits`, by default the
    same, is the width that the kernel uses: without key bits (MKTME) or less what SME takes.  `l1tf`: the processor has
    the bug; then `cache_bits` (by default `phys_bits`) is how many address bits its L1 cache looks at.
    `mmio_caching`: the module parameter as it was loaded.  `npt`: the set belongs to NPT, which changes no mask.

    ArgumentError: a width out of range, a version that is not known here.  Source: spte.c @v6.18.

    >>> masks = reset_all_pte_masks(46)
    >>> hex(masks.user_mask), hex(masks.nx_mask), hex(masks.mmio_value)
    ('0x4', '0x8000000000000000', '0x8000000000001')
    >>> hex(masks.set_ept_masks(True, True).present_mask)
    '0x8000000000000000'
    """
    call = "reset_all_pte_masks"
    phys_bits = number(call, "phys_bits", phys_bits, 52, 32)
    kept = phys_bits if x86_phys_bits is None else number(call, "x86_phys_bits", x86_phys_bits, phys_bits, 32)
    cache = phys_bits if cache_bits is None else number(call, "cache_bits", cache_bits, 52, 32)
    known = kernel_version(version, call)
    low_phys_bits, rsvd = kept, 0
    warned: tuple[str, ...] = ()
    if l1tf and cache >= 52 - _L1TF_LEN:
        warned = (f"a processor with L1TF whose cache looks at {cache} address bits, not less than 47: no protection",)
    elif l1tf:
        low_phys_bits = cache - _L1TF_LEN
        rsvd = _bits(low_phys_bits, cache - 1)
    value = 1 << 51 | _P if phys_bits < 52 else 0
    made = ShadowMasks(
        kind="npt" if npt else "shadow",
        version=f"{known[0]}.{known[1]}",
        kvm_ad_enabled=True,
        user_mask=_U,
        accessed_mask=_A,
        dirty_mask=_D,
        nx_mask=_NX,
        x_mask=0,
        present_mask=_P,
        acc_track_mask=0,
        me_value=0,
        me_mask=0,
        host_writable_mask=1 << 9,
        mmu_writable_mask=1 << 10,
        mmio_value=value,  # these three and enable_mmio_caching: see the last line
        mmio_mask=value,
        mmio_access_mask=value,
        memtype_mask=0,
        nonpresent_or_rsvd_mask=rsvd,
        nonpresent_or_rsvd_lower_gfn_mask=_bits(12, low_phys_bits - 1),
        nonpresent_value=_EPT_SUPPRESS_VE if known >= _NONPRESENT_VALUE else 0,
        has_mt_mask=False,
        mmio_caching=bool(mmio_caching),
        enable_mmio_caching=bool(mmio_caching),
        maxphyaddr=phys_bits,
        x86_phys_bits=kept,
        warnings=warned,
    )
    return made.set_mmio_spte_mask(value, value, _W | _U)
