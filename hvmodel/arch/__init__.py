"""Words of the x86 architecture, pure: no file descriptor, no extension, no clock.

registers     CR0, CR3, CR4, CR8, EFER, RFLAGS, XCR0, XSS, DR6, DR7 and the APIC base by their bits
modes         in which mode a processor with these registers is, and how it pages
segment       selectors, segment descriptors, gates
msr, cpuid    model-specific registers and CPUID leaves by name
legal         which special registers KVM takes, refuses or changes
tables        builders of GDT, IDT, TSS and IVT
paging        builders of page tables
vectors       the exceptions: their classes and error codes
exceptions    the queue of exceptions as KVM keeps it
"""

from __future__ import annotations

__all__: list[str] = []
