/*
 * The user ABI of KVM on x86-64: every structure, flag and number a program meets at /dev/kvm, up
 * to Linux 6.18.
 *
 * Describes include/uapi/linux/kvm.h, arch/x86/include/uapi/asm/kvm.h and the hypercall part of
 * include/uapi/linux/kvm_para.h and arch/x86/include/uapi/asm/kvm_para.h.  The request numbers are
 * in kvm_ioctl.tbl.
 *
 * One dialect for two readers, cffi's cdef() and the C compiler: fixed-width types, no directive
 * but #define NAME literal, no attribute.  Nested structures are tagged (parent_member), because
 * cffi lays out an anonymous union inside an untagged structure wrongly; the tags are ours, the
 * members the kernel's.  Members without a name in the kernel have none here.
 *
 * "4.x" to "8.x" is the section of Documentation/virt/kvm/api.rst, as numbered in Linux 7.0.
 * "since" is the first Linux release with it, given where it is later than 6.1.  Whether a host
 * has something is asked by KVM_CHECK_EXTENSION, never by version.
 *
 * Last proved against: linux-libc-dev 6.1 (Debian 12), the headers of Linux 6.13, 6.19 and 7.2
 * (which grows kvm_svm_nested_state_hdr within its union), the BTF of Linux 6.18.44.
 */

/* The API: KVM_GET_API_VERSION answers this (4.1); every request carries KVMIO as its type. */
#define KVM_API_VERSION 12
#define KVMIO		0xae

/*
 * Where the parts of a vCPU's mapping begin, in pages: kvm_run is page 0, then port data,
 * coalesced ring, dirty ring.
 */
#define KVM_PIO_PAGE_OFFSET	       1
#define KVM_COALESCED_MMIO_PAGE_OFFSET 2
#define KVM_DIRTY_LOG_PAGE_OFFSET      64

/*
 * VM types: the argument of KVM_CREATE_VM (4.2), bits of KVM_CAP_VM_TYPES.  Since v6.8; SEV v6.10,
 * SNP v6.11, TDX v6.16.
 */
#define KVM_X86_DEFAULT_VM	0
#define KVM_X86_SW_PROTECTED_VM 1
#define KVM_X86_SEV_VM		2
#define KVM_X86_SEV_ES_VM	3
#define KVM_X86_SNP_VM		4
#define KVM_X86_TDX_VM		5

/*
 * Capabilities: KVM_CHECK_EXTENSION (4.4), KVM_ENABLE_CAP (4.37, 6, 7).  One number space for all
 * architectures. The gaps are capabilities that left before 5.0 (device assignment and others).
 */
#define KVM_CAP_IRQCHIP			       0
#define KVM_CAP_HLT			       1
#define KVM_CAP_MMU_SHADOW_CACHE_CONTROL       2
#define KVM_CAP_USER_MEMORY		       3
#define KVM_CAP_SET_TSS_ADDR		       4
#define KVM_CAP_VAPIC			       6
#define KVM_CAP_EXT_CPUID		       7
#define KVM_CAP_CLOCKSOURCE		       8
#define KVM_CAP_NR_VCPUS		       9
#define KVM_CAP_NR_MEMSLOTS		       10
#define KVM_CAP_PIT			       11
#define KVM_CAP_NOP_IO_DELAY		       12
#define KVM_CAP_PV_MMU			       13
#define KVM_CAP_MP_STATE		       14
#define KVM_CAP_COALESCED_MMIO		       15
#define KVM_CAP_SYNC_MMU		       16
#define KVM_CAP_IOMMU			       18
#define KVM_CAP_DESTROY_MEMORY_REGION_WORKS    21
#define KVM_CAP_USER_NMI		       22
#define KVM_CAP_SET_GUEST_DEBUG		       23
#define KVM_CAP_REINJECT_CONTROL	       24
#define KVM_CAP_IRQ_ROUTING		       25
#define KVM_CAP_IRQ_INJECT_STATUS	       26
#define KVM_CAP_ASSIGN_DEV_IRQ		       29
#define KVM_CAP_JOIN_MEMORY_REGIONS_WORKS      30
#define KVM_CAP_MCE			       31
#define KVM_CAP_IRQFD			       32
#define KVM_CAP_PIT2			       33
#define KVM_CAP_SET_BOOT_CPU_ID		       34
#define KVM_CAP_PIT_STATE2		       35
#define KVM_CAP_IOEVENTFD		       36
#define KVM_CAP_SET_IDENTITY_MAP_ADDR	       37
#define KVM_CAP_XEN_HVM			       38
#define KVM_CAP_ADJUST_CLOCK		       39
#define KVM_CAP_INTERNAL_ERROR_DATA	       40
#define KVM_CAP_VCPU_EVENTS		       41
#define KVM_CAP_S390_PSW		       42
#define KVM_CAP_PPC_SEGSTATE		       43
#define KVM_CAP_HYPERV			       44
#define KVM_CAP_HYPERV_VAPIC		       45
#define KVM_CAP_HYPERV_SPIN		       46
#define KVM_CAP_PCI_SEGMENT		       47
#define KVM_CAP_PPC_PAIRED_SINGLES	       48
#define KVM_CAP_INTR_SHADOW		       49
#define KVM_CAP_DEBUGREGS		       50
#define KVM_CAP_X86_ROBUST_SINGLESTEP	       51
#define KVM_CAP_PPC_OSI			       52
#define KVM_CAP_PPC_UNSET_IRQ		       53
#define KVM_CAP_ENABLE_CAP		       54
#define KVM_CAP_XSAVE			       55
#define KVM_CAP_XCRS			       56
#define KVM_CAP_PPC_GET_PVINFO		       57
#define KVM_CAP_PPC_IRQ_LEVEL		       58
#define KVM_CAP_ASYNC_PF		       59
#define KVM_CAP_TSC_CONTROL		       60
#define KVM_CAP_GET_TSC_KHZ		       61
#define KVM_CAP_PPC_BOOKE_SREGS		       62
#define KVM_CAP_SPAPR_TCE		       63
#define KVM_CAP_PPC_SMT			       64
#define KVM_CAP_PPC_RMA			       65
#define KVM_CAP_MAX_VCPUS		       66
#define KVM_CAP_PPC_HIOR		       67
#define KVM_CAP_PPC_PAPR		       68
#define KVM_CAP_SW_TLB			       69
#define KVM_CAP_ONE_REG			       70
#define KVM_CAP_S390_GMAP		       71
#define KVM_CAP_TSC_DEADLINE_TIMER	       72
#define KVM_CAP_S390_UCONTROL		       73
#define KVM_CAP_SYNC_REGS		       74
#define KVM_CAP_PCI_2_3			       75
#define KVM_CAP_KVMCLOCK_CTRL		       76
#define KVM_CAP_SIGNAL_MSI		       77
#define KVM_CAP_PPC_GET_SMMU_INFO	       78
#define KVM_CAP_S390_COW		       79
#define KVM_CAP_PPC_ALLOC_HTAB		       80
#define KVM_CAP_READONLY_MEM		       81
#define KVM_CAP_IRQFD_RESAMPLE		       82
#define KVM_CAP_PPC_BOOKE_WATCHDOG	       83
#define KVM_CAP_PPC_HTAB_FD		       84
#define KVM_CAP_S390_CSS_SUPPORT	       85
#define KVM_CAP_PPC_EPR			       86
#define KVM_CAP_ARM_PSCI		       87
#define KVM_CAP_ARM_SET_DEVICE_ADDR	       88
#define KVM_CAP_DEVICE_CTRL		       89
#define KVM_CAP_IRQ_MPIC		       90
#define KVM_CAP_PPC_RTAS		       91
#define KVM_CAP_IRQ_XICS		       92
#define KVM_CAP_ARM_EL1_32BIT		       93
#define KVM_CAP_SPAPR_MULTITCE		       94
#define KVM_CAP_EXT_EMUL_CPUID		       95
#define KVM_CAP_HYPERV_TIME		       96
#define KVM_CAP_IOAPIC_POLARITY_IGNORED	       97
#define KVM_CAP_ENABLE_CAP_VM		       98
#define KVM_CAP_S390_IRQCHIP		       99
#define KVM_CAP_IOEVENTFD_NO_LENGTH	       100
#define KVM_CAP_VM_ATTRIBUTES		       101
#define KVM_CAP_ARM_PSCI_0_2		       102
#define KVM_CAP_PPC_FIXUP_HCALL		       103
#define KVM_CAP_PPC_ENABLE_HCALL	       104
#define KVM_CAP_CHECK_EXTENSION_VM	       105
#define KVM_CAP_S390_USER_SIGP		       106
#define KVM_CAP_S390_VECTOR_REGISTERS	       107
#define KVM_CAP_S390_MEM_OP		       108
#define KVM_CAP_S390_USER_STSI		       109
#define KVM_CAP_S390_SKEYS		       110
#define KVM_CAP_MIPS_FPU		       111
#define KVM_CAP_MIPS_MSA		       112
#define KVM_CAP_S390_INJECT_IRQ		       113
#define KVM_CAP_S390_IRQ_STATE		       114
#define KVM_CAP_PPC_HWRNG		       115
#define KVM_CAP_DISABLE_QUIRKS		       116
#define KVM_CAP_X86_SMM			       117
#define KVM_CAP_MULTI_ADDRESS_SPACE	       118
#define KVM_CAP_GUEST_DEBUG_HW_BPS	       119
#define KVM_CAP_GUEST_DEBUG_HW_WPS	       120
#define KVM_CAP_SPLIT_IRQCHIP		       121
#define KVM_CAP_IOEVENTFD_ANY_LENGTH	       122
#define KVM_CAP_HYPERV_SYNIC		       123
#define KVM_CAP_S390_RI			       124
#define KVM_CAP_SPAPR_TCE_64		       125
#define KVM_CAP_ARM_PMU_V3		       126
#define KVM_CAP_VCPU_ATTRIBUTES		       127
#define KVM_CAP_MAX_VCPU_ID		       128
#define KVM_CAP_X2APIC_API		       129
#define KVM_CAP_S390_USER_INSTR0	       130
#define KVM_CAP_MSI_DEVID		       131
#define KVM_CAP_PPC_HTM			       132
#define KVM_CAP_SPAPR_RESIZE_HPT	       133
#define KVM_CAP_PPC_MMU_RADIX		       134
#define KVM_CAP_PPC_MMU_HASH_V3		       135
#define KVM_CAP_IMMEDIATE_EXIT		       136
#define KVM_CAP_MIPS_VZ			       137
#define KVM_CAP_MIPS_TE			       138
#define KVM_CAP_MIPS_64BIT		       139
#define KVM_CAP_S390_GS			       140
#define KVM_CAP_S390_AIS		       141
#define KVM_CAP_SPAPR_TCE_VFIO		       142
#define KVM_CAP_X86_DISABLE_EXITS	       143
#define KVM_CAP_ARM_USER_IRQ		       144
#define KVM_CAP_S390_CMMA_MIGRATION	       145
#define KVM_CAP_PPC_FWNMI		       146
#define KVM_CAP_PPC_SMT_POSSIBLE	       147
#define KVM_CAP_HYPERV_SYNIC2		       148
#define KVM_CAP_HYPERV_VP_INDEX		       149
#define KVM_CAP_S390_AIS_MIGRATION	       150
#define KVM_CAP_PPC_GET_CPU_CHAR	       151
#define KVM_CAP_S390_BPB		       152
#define KVM_CAP_GET_MSR_FEATURES	       153
#define KVM_CAP_HYPERV_EVENTFD		       154
#define KVM_CAP_HYPERV_TLBFLUSH		       155
#define KVM_CAP_S390_HPAGE_1M		       156
#define KVM_CAP_NESTED_STATE		       157
#define KVM_CAP_ARM_INJECT_SERROR_ESR	       158
#define KVM_CAP_MSR_PLATFORM_INFO	       159
#define KVM_CAP_PPC_NESTED_HV		       160
#define KVM_CAP_HYPERV_SEND_IPI		       161
#define KVM_CAP_COALESCED_PIO		       162
#define KVM_CAP_HYPERV_ENLIGHTENED_VMCS	       163
#define KVM_CAP_EXCEPTION_PAYLOAD	       164
#define KVM_CAP_ARM_VM_IPA_SIZE		       165
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT       166
#define KVM_CAP_HYPERV_CPUID		       167
#define KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2      168
#define KVM_CAP_PPC_IRQ_XIVE		       169
#define KVM_CAP_ARM_SVE			       170
#define KVM_CAP_ARM_PTRAUTH_ADDRESS	       171
#define KVM_CAP_ARM_PTRAUTH_GENERIC	       172
#define KVM_CAP_PMU_EVENT_FILTER	       173
#define KVM_CAP_ARM_IRQ_LINE_LAYOUT_2	       174
#define KVM_CAP_HYPERV_DIRECT_TLBFLUSH	       175
#define KVM_CAP_PPC_GUEST_DEBUG_SSTEP	       176
#define KVM_CAP_ARM_NISV_TO_USER	       177
#define KVM_CAP_ARM_INJECT_EXT_DABT	       178
#define KVM_CAP_S390_VCPU_RESETS	       179
#define KVM_CAP_S390_PROTECTED		       180
#define KVM_CAP_PPC_SECURE_GUEST	       181
#define KVM_CAP_HALT_POLL		       182
#define KVM_CAP_ASYNC_PF_INT		       183
#define KVM_CAP_LAST_CPU		       184
#define KVM_CAP_SMALLER_MAXPHYADDR	       185
#define KVM_CAP_S390_DIAG318		       186
#define KVM_CAP_STEAL_TIME		       187
#define KVM_CAP_X86_USER_SPACE_MSR	       188
#define KVM_CAP_X86_MSR_FILTER		       189
#define KVM_CAP_ENFORCE_PV_FEATURE_CPUID       190
#define KVM_CAP_SYS_HYPERV_CPUID	       191
#define KVM_CAP_DIRTY_LOG_RING		       192
#define KVM_CAP_X86_BUS_LOCK_EXIT	       193
#define KVM_CAP_PPC_DAWR1		       194
#define KVM_CAP_SET_GUEST_DEBUG2	       195
#define KVM_CAP_SGX_ATTRIBUTE		       196
#define KVM_CAP_VM_COPY_ENC_CONTEXT_FROM       197
#define KVM_CAP_PTP_KVM			       198
#define KVM_CAP_HYPERV_ENFORCE_CPUID	       199
#define KVM_CAP_SREGS2			       200
#define KVM_CAP_EXIT_HYPERCALL		       201
#define KVM_CAP_PPC_RPT_INVALIDATE	       202
#define KVM_CAP_BINARY_STATS_FD		       203
#define KVM_CAP_EXIT_ON_EMULATION_FAILURE      204
#define KVM_CAP_ARM_MTE			       205
#define KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM       206
#define KVM_CAP_VM_GPA_BITS		       207
#define KVM_CAP_XSAVE2			       208
#define KVM_CAP_SYS_ATTRIBUTES		       209
#define KVM_CAP_PPC_AIL_MODE_3		       210
#define KVM_CAP_S390_MEM_OP_EXTENSION	       211
#define KVM_CAP_PMU_CAPABILITY		       212
#define KVM_CAP_DISABLE_QUIRKS2		       213
#define KVM_CAP_VM_TSC_CONTROL		       214
#define KVM_CAP_SYSTEM_EVENT_DATA	       215
#define KVM_CAP_ARM_SYSTEM_SUSPEND	       216
#define KVM_CAP_S390_PROTECTED_DUMP	       217
#define KVM_CAP_X86_TRIPLE_FAULT_EVENT	       218
#define KVM_CAP_X86_NOTIFY_VMEXIT	       219
#define KVM_CAP_VM_DISABLE_NX_HUGE_PAGES       220
#define KVM_CAP_S390_ZPCI_OP		       221
#define KVM_CAP_S390_CPU_TOPOLOGY	       222
#define KVM_CAP_DIRTY_LOG_RING_ACQ_REL	       223
#define KVM_CAP_S390_PROTECTED_ASYNC_DISABLE   224
#define KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP     225
#define KVM_CAP_PMU_EVENT_MASKED_EVENTS	       226
#define KVM_CAP_COUNTER_OFFSET		       227
#define KVM_CAP_ARM_EAGER_SPLIT_CHUNK_SIZE     228
#define KVM_CAP_ARM_SUPPORTED_BLOCK_SIZES      229
#define KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES  230
#define KVM_CAP_USER_MEMORY2		       231
#define KVM_CAP_MEMORY_FAULT_INFO	       232
#define KVM_CAP_MEMORY_ATTRIBUTES	       233
#define KVM_CAP_GUEST_MEMFD		       234
#define KVM_CAP_VM_TYPES		       235
#define KVM_CAP_PRE_FAULT_MEMORY	       236
#define KVM_CAP_X86_APIC_BUS_CYCLES_NS	       237
#define KVM_CAP_X86_GUEST_MODE		       238
#define KVM_CAP_ARM_WRITABLE_IMP_ID_REGS       239
#define KVM_CAP_ARM_EL2			       240
#define KVM_CAP_ARM_EL2_E2H0		       241
#define KVM_CAP_RISCV_MP_STATE_RESET	       242
#define KVM_CAP_ARM_CACHEABLE_PFNMAP_SUPPORTED 243
#define KVM_CAP_GUEST_MEMFD_FLAGS	       244

/* KVM_ENABLE_CAP (4.37). */
struct kvm_enable_cap {
	uint32_t cap;
	uint32_t flags;
	uint64_t args[4];
	uint8_t pad[64];
};

/* Values of capabilities' arguments and answers follow (section 7). */

/*
 * KVM_CAP_DISABLE_QUIRKS, KVM_CAP_DISABLE_QUIRKS2 (7.31). SLOT_ZAP_ALL since v6.12,
 * STUFF_FEATURE_MSRS v6.13, IGNORE_GUEST_PAT v6.16. VMCS12_ALLOW_FREEZE_IN_SMM is of v7.0 and came
 * to 6.18.y as a fix.
 */
#define KVM_X86_QUIRK_LINT0_REENABLED		 0x1
#define KVM_X86_QUIRK_CD_NW_CLEARED		 0x2
#define KVM_X86_QUIRK_LAPIC_MMIO_HOLE		 0x4
#define KVM_X86_QUIRK_OUT_7E_INC_RIP		 0x8
#define KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT	 0x10
#define KVM_X86_QUIRK_FIX_HYPERCALL_INSN	 0x20
#define KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS	 0x40
#define KVM_X86_QUIRK_SLOT_ZAP_ALL		 0x80
#define KVM_X86_QUIRK_STUFF_FEATURE_MSRS	 0x100
#define KVM_X86_QUIRK_IGNORE_GUEST_PAT		 0x200
#define KVM_X86_QUIRK_VMCS12_ALLOW_FREEZE_IN_SMM 0x400

/* KVM_CAP_X86_DISABLE_EXITS (7.13).  APERFMPERF since v6.17. */
#define KVM_X86_DISABLE_EXITS_MWAIT	 0x1
#define KVM_X86_DISABLE_EXITS_HLT	 0x2
#define KVM_X86_DISABLE_EXITS_PAUSE	 0x4
#define KVM_X86_DISABLE_EXITS_CSTATE	 0x8
#define KVM_X86_DISABLE_EXITS_APERFMPERF 0x10

/*
 * KVM_CAP_X2APIC_API (7.7).  The two for "suppress EOI broadcast" are of v7.0 and came to 6.18.y as
 * a fix.
 */
#define KVM_X2APIC_API_USE_32BIT_IDS		  0x1
#define KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK	  0x2
#define KVM_X2APIC_ENABLE_SUPPRESS_EOI_BROADCAST  0x4
#define KVM_X2APIC_DISABLE_SUPPRESS_EOI_BROADCAST 0x8

/* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (7.18). */
#define KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE 0x1
#define KVM_DIRTY_LOG_INITIALLY_SET	    0x2

/* KVM_CAP_X86_USER_SPACE_MSR (7.21): which accesses exit. */
#define KVM_MSR_EXIT_REASON_INVAL      0x1
#define KVM_MSR_EXIT_REASON_UNKNOWN    0x2
#define KVM_MSR_EXIT_REASON_FILTER     0x4
#define KVM_MSR_EXIT_REASON_VALID_MASK 0x7

/* KVM_CAP_X86_BUS_LOCK_EXIT (7.22). */
#define KVM_BUS_LOCK_DETECTION_OFF  0x1
#define KVM_BUS_LOCK_DETECTION_EXIT 0x2

/* KVM_CAP_PMU_CAPABILITY (7.37). */
#define KVM_PMU_CAP_DISABLE 0x1

/* KVM_CAP_X86_NOTIFY_VMEXIT (7.33). */
#define KVM_X86_NOTIFY_VMEXIT_ENABLED 0x1
#define KVM_X86_NOTIFY_VMEXIT_USER    0x2

/*
 * System-fd attributes (KVM_CAP_SYS_ATTRIBUTES): groups, and the attributes of each.
 * KVM_X86_GRP_SEV since v6.10.
 */
#define KVM_X86_GRP_SYSTEM	  0
#define KVM_X86_XCOMP_GUEST_SUPP  0
#define KVM_X86_GRP_SEV		  1
#define KVM_X86_SEV_VMSA_FEATURES 0

/*
 * Memory slots: KVM_SET_USER_MEMORY_REGION (4.35), KVM_SET_USER_MEMORY_REGION2 (4.140, since
 * v6.8).
 */
struct kvm_memory_region {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
};

struct kvm_userspace_memory_region {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
};

struct kvm_userspace_memory_region2 {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	uint64_t guest_memfd_offset;
	uint32_t guest_memfd;
	uint32_t pad1;
	uint64_t pad2[14];
};

#define KVM_MEM_LOG_DIRTY_PAGES 0x1
#define KVM_MEM_READONLY	0x2
#define KVM_MEM_GUEST_MEMFD	0x4

/* Memory attributes: KVM_SET_MEMORY_ATTRIBUTES (4.141, since v6.8). */
struct kvm_memory_attributes {
	uint64_t address;
	uint64_t size;
	uint64_t attributes;
	uint64_t flags;
};

#define KVM_MEMORY_ATTRIBUTE_PRIVATE 0x8

/*
 * guest_memfd: KVM_CREATE_GUEST_MEMFD (4.142, since v6.8); its flags (KVM_CAP_GUEST_MEMFD_FLAGS)
 * since v6.18.
 */
struct kvm_create_guest_memfd {
	uint64_t size;
	uint64_t flags;
	uint64_t reserved[6];
};

#define GUEST_MEMFD_FLAG_MMAP	     0x1
#define GUEST_MEMFD_FLAG_INIT_SHARED 0x2

/* Populate a range before the guest touches it: KVM_PRE_FAULT_MEMORY (4.143, since v6.11). */
struct kvm_pre_fault_memory {
	uint64_t gpa;
	uint64_t size;
	uint64_t flags;
	uint64_t padding[5];
};

/*
 * Dirty log: KVM_GET_DIRTY_LOG (4.8), KVM_CLEAR_DIRTY_LOG (4.117); a bit per page, little-endian,
 * 64 pages a word.
 */
struct kvm_dirty_log {
	uint32_t slot;
	uint32_t padding1;
	union {
		void *dirty_bitmap;
		uint64_t padding2;
	};
};

struct kvm_clear_dirty_log {
	uint32_t slot;
	uint32_t num_pages;
	uint64_t first_page;
	union {
		void *dirty_bitmap;
		uint64_t padding2;
	};
};

/*
 * Dirty ring: KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL (7.36); an entry goes 0 ->
 * DIRTY (kernel) -> RESET (us) -> 0 (kernel).
 */
struct kvm_dirty_gfn {
	uint32_t flags;
	uint32_t slot;
	uint64_t offset;
};

#define KVM_DIRTY_GFN_F_DIRTY 0x1
#define KVM_DIRTY_GFN_F_RESET 0x2
#define KVM_DIRTY_GFN_F_MASK  0x3

/*
 * Coalesced MMIO and PIO (4.116): the ring fills the page, (4096 - 8) / 24 = 170 entries, one of
 * which stays free.
 */
struct kvm_coalesced_mmio_zone {
	uint64_t addr;
	uint32_t size;
	union {
		uint32_t pad;
		uint32_t pio;
	};
};

struct kvm_coalesced_mmio {
	uint64_t phys_addr;
	uint32_t len;
	union {
		uint32_t pad;
		uint32_t pio;
	};
	uint8_t data[8];
};

struct kvm_coalesced_mmio_ring {
	uint32_t first, last;
	struct kvm_coalesced_mmio coalesced_mmio[];
};

/* Address translation as the vCPU would do it: KVM_TRANSLATE (4.15). */
struct kvm_translation {
	uint64_t linear_address;
	uint64_t physical_address;
	uint8_t valid;
	uint8_t writeable;
	uint8_t usermode;
	uint8_t pad[5];
};

/* General registers: KVM_GET_REGS, KVM_SET_REGS (4.11, 4.12). */
struct kvm_regs {
	uint64_t rax, rbx, rcx, rdx;
	uint64_t rsi, rdi, rsp, rbp;
	uint64_t r8, r9, r10, r11;
	uint64_t r12, r13, r14, r15;
	uint64_t rip, rflags;
};

/*
 * Segment, control and table registers: KVM_GET_SREGS (4.13), KVM_SET_SREGS (4.14), and with
 * PDPTRs KVM_GET_SREGS2 (4.131), KVM_SET_SREGS2 (4.132).
 */
#define KVM_NR_INTERRUPTS 256

struct kvm_segment {
	uint64_t base;
	uint32_t limit;
	uint16_t selector;
	uint8_t type;
	uint8_t present, dpl, db, s, l, g, avl;
	uint8_t unusable;
	uint8_t padding;
};

struct kvm_dtable {
	uint64_t base;
	uint16_t limit;
	uint16_t padding[3];
};

struct kvm_sregs {
	struct kvm_segment cs, ds, es, fs, gs, ss;
	struct kvm_segment tr, ldt;
	struct kvm_dtable gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, cr8;
	uint64_t efer;
	uint64_t apic_base;
	uint64_t interrupt_bitmap[4];
};

struct kvm_sregs2 {
	struct kvm_segment cs, ds, es, fs, gs, ss;
	struct kvm_segment tr, ldt;
	struct kvm_dtable gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, cr8;
	uint64_t efer;
	uint64_t apic_base;
	uint64_t flags;
	uint64_t pdptrs[4];
};

#define KVM_SREGS2_FLAGS_PDPTRS_VALID 1

/* x87 and SSE: KVM_GET_FPU (4.22), KVM_SET_FPU (4.23). */
struct kvm_fpu {
	uint8_t fpr[8][16];
	uint16_t fcw;
	uint16_t fsw;
	uint8_t ftwx;
	uint8_t pad1;
	uint16_t last_opcode;
	uint64_t last_ip;
	uint64_t last_dp;
	uint8_t xmm[16][16];
	uint32_t mxcsr;
	uint32_t pad2;
};

/*
 * XSAVE area: KVM_GET_XSAVE, KVM_SET_XSAVE (4.42, 4.43), KVM_GET_XSAVE2 (4.134).  GET_XSAVE2
 * writes and SET_XSAVE reads KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) bytes, at least 4096; `extra` is
 * what lies beyond.
 */
struct kvm_xsave {
	uint32_t region[1024];
	uint32_t extra[];
};

/* Extended control registers: KVM_GET_XCRS, KVM_SET_XCRS (4.44, 4.45). */
#define KVM_MAX_XCRS 16

struct kvm_xcr {
	uint32_t xcr;
	uint32_t reserved;
	uint64_t value;
};

struct kvm_xcrs {
	uint32_t nr_xcrs;
	uint32_t flags;
	struct kvm_xcr xcrs[16];
	uint64_t padding[16];
};

/* Debug registers: KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS (4.33, 4.34). */
struct kvm_debugregs {
	uint64_t db[4];
	uint64_t dr6;
	uint64_t dr7;
	uint64_t flags;
	uint64_t reserved[9];
};

/* Model-specific registers: KVM_GET_MSRS (4.18), KVM_SET_MSRS (4.19), the index lists (4.3). */
struct kvm_msr_entry {
	uint32_t index;
	uint32_t reserved;
	uint64_t data;
};

struct kvm_msrs {
	uint32_t nmsrs;
	uint32_t pad;
	struct kvm_msr_entry entries[];
};

struct kvm_msr_list {
	uint32_t nmsrs;
	uint32_t indices[];
};

/* MSR filter: KVM_X86_SET_MSR_FILTER (4.97). */
#define KVM_MSR_FILTER_MAX_BITMAP_SIZE	0x600
#define KVM_MSR_FILTER_MAX_RANGES	16
#define KVM_MSR_FILTER_READ		0x1
#define KVM_MSR_FILTER_WRITE		0x2
#define KVM_MSR_FILTER_RANGE_VALID_MASK 0x3
#define KVM_MSR_FILTER_DEFAULT_ALLOW	0x0
#define KVM_MSR_FILTER_DEFAULT_DENY	0x1
#define KVM_MSR_FILTER_VALID_MASK	0x1

struct kvm_msr_filter_range {
	uint32_t flags;
	uint32_t nmsrs;
	uint32_t base;
	uint8_t *bitmap;
};

struct kvm_msr_filter {
	uint32_t flags;
	struct kvm_msr_filter_range ranges[16];
};

/*
 * CPUID: KVM_SET_CPUID (4.20), KVM_SET_CPUID2, KVM_GET_SUPPORTED_CPUID (4.46),
 * KVM_GET_EMULATED_CPUID (4.88) and others.
 */
struct kvm_cpuid_entry {
	uint32_t function;
	uint32_t eax;
	uint32_t ebx;
	uint32_t ecx;
	uint32_t edx;
	uint32_t padding;
};

struct kvm_cpuid {
	uint32_t nent;
	uint32_t padding;
	struct kvm_cpuid_entry entries[];
};

struct kvm_cpuid_entry2 {
	uint32_t function;
	uint32_t index;
	uint32_t flags;
	uint32_t eax;
	uint32_t ebx;
	uint32_t ecx;
	uint32_t edx;
	uint32_t padding[3];
};

struct kvm_cpuid2 {
	uint32_t nent;
	uint32_t padding;
	struct kvm_cpuid_entry2 entries[];
};

#define KVM_CPUID_FLAG_SIGNIFCANT_INDEX 0x1
#define KVM_CPUID_FLAG_STATEFUL_FUNC	0x2
#define KVM_CPUID_FLAG_STATE_READ_NEXT	0x4

/*
 * Registers by number: KVM_SET_ONE_REG (4.68), KVM_GET_ONE_REG (4.69), KVM_GET_REG_LIST (4.84); on
 * x86 since v6.18.
 */
struct kvm_one_reg {
	uint64_t id;
	uint64_t addr;
};

struct kvm_reg_list {
	uint64_t n;
	uint64_t reg[];
};

#define KVM_REG_ARCH_MASK    0xff00000000000000
#define KVM_REG_GENERIC	     0x0
#define KVM_REG_X86	     0x2000000000000000
#define KVM_REG_SIZE_SHIFT   52
#define KVM_REG_SIZE_MASK    0xf0000000000000
#define KVM_REG_SIZE_U8	     0x0
#define KVM_REG_SIZE_U16     0x10000000000000
#define KVM_REG_SIZE_U32     0x20000000000000
#define KVM_REG_SIZE_U64     0x30000000000000
#define KVM_REG_SIZE_U128    0x40000000000000
#define KVM_REG_SIZE_U256    0x50000000000000
#define KVM_REG_SIZE_U512    0x60000000000000
#define KVM_REG_SIZE_U1024   0x70000000000000
#define KVM_REG_SIZE_U2048   0x80000000000000
#define KVM_X86_REG_TYPE_MSR 2
#define KVM_X86_REG_TYPE_KVM 3
#define KVM_REG_GUEST_SSP    0

/* Exception vectors; CP, HV, VC and SX since v6.18. */
#define DE_VECTOR 0
#define DB_VECTOR 1
#define BP_VECTOR 3
#define OF_VECTOR 4
#define BR_VECTOR 5
#define UD_VECTOR 6
#define NM_VECTOR 7
#define DF_VECTOR 8
#define TS_VECTOR 10
#define NP_VECTOR 11
#define SS_VECTOR 12
#define GP_VECTOR 13
#define PF_VECTOR 14
#define MF_VECTOR 16
#define AC_VECTOR 17
#define MC_VECTOR 18
#define XM_VECTOR 19
#define VE_VECTOR 20
#define CP_VECTOR 21
#define HV_VECTOR 28
#define VC_VECTOR 29
#define SX_VECTOR 30

/* Events in flight: KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS (4.31, 4.32). */
#define KVM_VCPUEVENT_VALID_NMI_PENDING	 0x1
#define KVM_VCPUEVENT_VALID_SIPI_VECTOR	 0x2
#define KVM_VCPUEVENT_VALID_SHADOW	 0x4
#define KVM_VCPUEVENT_VALID_SMM		 0x8
#define KVM_VCPUEVENT_VALID_PAYLOAD	 0x10
#define KVM_VCPUEVENT_VALID_TRIPLE_FAULT 0x20
#define KVM_X86_SHADOW_INT_MOV_SS	 0x1
#define KVM_X86_SHADOW_INT_STI		 0x2

struct kvm_vcpu_events_exception {
	uint8_t injected;
	uint8_t nr;
	uint8_t has_error_code;
	uint8_t pending;
	uint32_t error_code;
};

struct kvm_vcpu_events_interrupt {
	uint8_t injected;
	uint8_t nr;
	uint8_t soft;
	uint8_t shadow;
};

struct kvm_vcpu_events_nmi {
	uint8_t injected;
	uint8_t pending;
	uint8_t masked;
	uint8_t pad;
};

struct kvm_vcpu_events_smi {
	uint8_t smm;
	uint8_t pending;
	uint8_t smm_inside_nmi;
	uint8_t latched_init;
};

struct kvm_vcpu_events_triple_fault {
	uint8_t pending;
};

struct kvm_vcpu_events {
	struct kvm_vcpu_events_exception exception;
	struct kvm_vcpu_events_interrupt interrupt;
	struct kvm_vcpu_events_nmi nmi;
	uint32_t sipi_vector;
	uint32_t flags;
	struct kvm_vcpu_events_smi smi;
	struct kvm_vcpu_events_triple_fault triple_fault;
	uint8_t reserved[26];
	uint8_t exception_has_payload;
	uint64_t exception_payload;
};

/* What the vCPU is doing: KVM_GET_MP_STATE (4.38), KVM_SET_MP_STATE (4.39). */
#define KVM_MP_STATE_RUNNABLE	   0
#define KVM_MP_STATE_UNINITIALIZED 1
#define KVM_MP_STATE_INIT_RECEIVED 2
#define KVM_MP_STATE_HALTED	   3
#define KVM_MP_STATE_SIPI_RECEIVED 4
#define KVM_MP_STATE_STOPPED	   5
#define KVM_MP_STATE_CHECK_STOP	   6
#define KVM_MP_STATE_OPERATING	   7
#define KVM_MP_STATE_LOAD	   8
#define KVM_MP_STATE_AP_RESET_HOLD 9
#define KVM_MP_STATE_SUSPENDED	   10

struct kvm_mp_state {
	uint32_t mp_state;
};

/*
 * Guest debugging: KVM_SET_GUEST_DEBUG (4.87).  The low half of `control` is generic, the high
 * half x86's.
 */
#define KVM_GUESTDBG_ENABLE	0x1
#define KVM_GUESTDBG_SINGLESTEP 0x2
#define KVM_GUESTDBG_USE_SW_BP	0x10000
#define KVM_GUESTDBG_USE_HW_BP	0x20000
#define KVM_GUESTDBG_INJECT_DB	0x40000
#define KVM_GUESTDBG_INJECT_BP	0x80000
#define KVM_GUESTDBG_BLOCKIRQ	0x100000

struct kvm_guest_debug_arch {
	uint64_t debugreg[8];
};

struct kvm_guest_debug {
	uint32_t control;
	uint32_t pad;
	struct kvm_guest_debug_arch arch;
};

struct kvm_debug_exit_arch {
	uint32_t exception;
	uint32_t pad;
	uint64_t pc;
	uint64_t dr6;
	uint64_t dr7;
};

/*
 * Interrupt without an in-kernel irqchip: KVM_INTERRUPT (4.16); signals let in during KVM_RUN:
 * KVM_SET_SIGNAL_MASK (4.21).
 */
struct kvm_interrupt {
	uint32_t irq;
};

struct kvm_signal_mask {
	uint32_t len;
	uint8_t sigset[];
};

/* TPR optimisation for 32-bit guests: KVM_TPR_ACCESS_REPORTING, KVM_SET_VAPIC_ADDR. */
struct kvm_tpr_access_ctl {
	uint32_t enabled;
	uint32_t flags;
	uint32_t reserved[8];
};

struct kvm_vapic_addr {
	uint64_t vapic_addr;
};

/*
 * Machine checks: KVM_X86_GET_MCE_CAP_SUPPORTED (4.104), KVM_X86_SETUP_MCE (4.105),
 * KVM_X86_SET_MCE (4.106).
 */
struct kvm_x86_mce {
	uint64_t status;
	uint64_t addr;
	uint64_t misc;
	uint64_t mcg_status;
	uint8_t bank;
	uint8_t pad1[7];
	uint64_t pad2[3];
};

/* Local APIC: KVM_GET_LAPIC (4.57), KVM_SET_LAPIC (4.58); the register page as in xAPIC. */
#define KVM_APIC_REG_SIZE 0x400

struct kvm_lapic_state {
	char regs[1024];
};

/* PIC and I/O APIC: KVM_GET_IRQCHIP (4.26), KVM_SET_IRQCHIP (4.27). */
#define KVM_IRQCHIP_PIC_MASTER 0
#define KVM_IRQCHIP_PIC_SLAVE  1
#define KVM_IRQCHIP_IOAPIC     2
#define KVM_NR_IRQCHIPS	       3
#define KVM_IOAPIC_NUM_PINS    24

struct kvm_pic_state {
	uint8_t last_irr;
	uint8_t irr;
	uint8_t imr;
	uint8_t isr;
	uint8_t priority_add;
	uint8_t irq_base;
	uint8_t read_reg_select;
	uint8_t poll;
	uint8_t special_mask;
	uint8_t init_state;
	uint8_t auto_eoi;
	uint8_t rotate_on_auto_eoi;
	uint8_t special_fully_nested_mode;
	uint8_t init4;
	uint8_t elcr;
	uint8_t elcr_mask;
};

struct kvm_ioapic_state_redirtbl_fields {
	uint8_t vector;
	uint8_t delivery_mode : 3;
	uint8_t dest_mode : 1;
	uint8_t delivery_status : 1;
	uint8_t polarity : 1;
	uint8_t remote_irr : 1;
	uint8_t trig_mode : 1;
	uint8_t mask : 1;
	uint8_t reserve : 7;
	uint8_t reserved[4];
	uint8_t dest_id;
};

union kvm_ioapic_state_redirtbl {
	uint64_t bits;
	struct kvm_ioapic_state_redirtbl_fields fields;
};

struct kvm_ioapic_state {
	uint64_t base_address;
	uint32_t ioregsel;
	uint32_t id;
	uint32_t irr;
	uint32_t pad;
	union kvm_ioapic_state_redirtbl redirtbl[24];
};

union kvm_irqchip_chip {
	char dummy[512];
	struct kvm_pic_state pic;
	struct kvm_ioapic_state ioapic;
};

struct kvm_irqchip {
	uint32_t chip_id;
	uint32_t pad;
	union kvm_irqchip_chip chip;
};

/*
 * Interval timer: KVM_CREATE_PIT2 (4.71), KVM_GET_PIT2 (4.72), KVM_SET_PIT2 (4.73),
 * KVM_REINJECT_CONTROL (4.99).
 */
#define KVM_PIT_SPEAKER_DUMMY	      1
#define KVM_PIT_FLAGS_HPET_LEGACY     0x1
#define KVM_PIT_FLAGS_SPEAKER_DATA_ON 0x2

struct kvm_pit_config {
	uint32_t flags;
	uint32_t pad[15];
};

struct kvm_pit_channel_state {
	uint32_t count;
	uint16_t latched_count;
	uint8_t count_latched;
	uint8_t status_latched;
	uint8_t status;
	uint8_t read_state;
	uint8_t write_state;
	uint8_t write_latch;
	uint8_t rw_mode;
	uint8_t mode;
	uint8_t bcd;
	uint8_t gate;
	int64_t count_load_time;
};

struct kvm_pit_state {
	struct kvm_pit_channel_state channels[3];
};

struct kvm_pit_state2 {
	struct kvm_pit_channel_state channels[3];
	uint32_t flags;
	uint32_t reserved[9];
};

struct kvm_reinject_control {
	uint8_t pit_reinject;
	uint8_t reserved[31];
};

/* Interrupt lines and messages: KVM_IRQ_LINE (4.25), KVM_SIGNAL_MSI (4.71). */
struct kvm_irq_level {
	union {
		uint32_t irq;
		int32_t status;
	};
	uint32_t level;
};

struct kvm_msi {
	uint32_t address_lo;
	uint32_t address_hi;
	uint32_t data;
	uint32_t flags;
	uint32_t devid;
	uint8_t pad[12];
};

#define KVM_MSI_VALID_DEVID 0x1

/* GSI routing: KVM_SET_GSI_ROUTING (4.52). */
#define KVM_IRQ_ROUTING_IRQCHIP		       1
#define KVM_IRQ_ROUTING_MSI		       2
#define KVM_IRQ_ROUTING_S390_ADAPTER	       3
#define KVM_IRQ_ROUTING_HV_SINT		       4
#define KVM_IRQ_ROUTING_XEN_EVTCHN	       5
#define KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL 0xffffffff

struct kvm_irq_routing_irqchip {
	uint32_t irqchip;
	uint32_t pin;
};

struct kvm_irq_routing_msi {
	uint32_t address_lo;
	uint32_t address_hi;
	uint32_t data;
	union {
		uint32_t pad;
		uint32_t devid;
	};
};

struct kvm_irq_routing_s390_adapter {
	uint64_t ind_addr;
	uint64_t summary_addr;
	uint64_t ind_offset;
	uint32_t summary_offset;
	uint32_t adapter_id;
};

struct kvm_irq_routing_hv_sint {
	uint32_t vcpu;
	uint32_t sint;
};

struct kvm_irq_routing_xen_evtchn {
	uint32_t port;
	uint32_t vcpu;
	uint32_t priority;
};

union kvm_irq_routing_entry_u {
	struct kvm_irq_routing_irqchip irqchip;
	struct kvm_irq_routing_msi msi;
	struct kvm_irq_routing_s390_adapter adapter;
	struct kvm_irq_routing_hv_sint hv_sint;
	struct kvm_irq_routing_xen_evtchn xen_evtchn;
	uint32_t pad[8];
};

struct kvm_irq_routing_entry {
	uint32_t gsi;
	uint32_t type;
	uint32_t flags;
	uint32_t pad;
	union kvm_irq_routing_entry_u u;
};

struct kvm_irq_routing {
	uint32_t nr;
	uint32_t flags;
	struct kvm_irq_routing_entry entries[];
};

/*
 * Eventfds: KVM_IRQFD (4.75) raises an interrupt, KVM_IOEVENTFD (4.59) answers a write in the
 * kernel.
 */
#define KVM_IRQFD_FLAG_DEASSIGN 0x1
#define KVM_IRQFD_FLAG_RESAMPLE 0x2

struct kvm_irqfd {
	uint32_t fd;
	uint32_t gsi;
	uint32_t flags;
	uint32_t resamplefd;
	uint8_t pad[16];
};

#define KVM_IOEVENTFD_FLAG_DATAMATCH	     0x1
#define KVM_IOEVENTFD_FLAG_PIO		     0x2
#define KVM_IOEVENTFD_FLAG_DEASSIGN	     0x4
#define KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY 0x8
#define KVM_IOEVENTFD_VALID_FLAG_MASK	     0x1f

struct kvm_ioeventfd {
	uint64_t datamatch;
	uint64_t addr;
	uint32_t len;
	int32_t fd;
	uint32_t flags;
	uint8_t pad[36];
};

/* Clock: KVM_GET_CLOCK (4.29), KVM_SET_CLOCK (4.30). */
#define KVM_CLOCK_TSC_STABLE 2
#define KVM_CLOCK_REALTIME   0x4
#define KVM_CLOCK_HOST_TSC   0x8

struct kvm_clock_data {
	uint64_t clock;
	uint32_t flags;
	uint32_t pad0;
	uint64_t realtime;
	uint64_t host_tsc;
	uint32_t pad[4];
};

/* Devices: KVM_CREATE_DEVICE (4.79), attributes (4.80, 4.81). */
#define KVM_CREATE_DEVICE_TEST	       1
#define KVM_DEV_TYPE_FSL_MPIC_20       1
#define KVM_DEV_TYPE_FSL_MPIC_42       2
#define KVM_DEV_TYPE_XICS	       3
#define KVM_DEV_TYPE_VFIO	       4
#define KVM_DEV_TYPE_ARM_VGIC_V2       5
#define KVM_DEV_TYPE_FLIC	       6
#define KVM_DEV_TYPE_ARM_VGIC_V3       7
#define KVM_DEV_TYPE_ARM_VGIC_ITS      8
#define KVM_DEV_TYPE_XIVE	       9
#define KVM_DEV_TYPE_ARM_PV_TIME       10
#define KVM_DEV_TYPE_RISCV_AIA	       11
#define KVM_DEV_TYPE_LOONGARCH_IPI     12
#define KVM_DEV_TYPE_LOONGARCH_EIOINTC 13
#define KVM_DEV_TYPE_LOONGARCH_PCHPIC  14

struct kvm_create_device {
	uint32_t type;
	uint32_t fd;
	uint32_t flags;
};

struct kvm_device_attr {
	uint32_t flags;
	uint32_t group;
	uint64_t attr;
	uint64_t addr;
};

/* The VFIO device (devices/vfio.rst). */
#define KVM_DEV_VFIO_FILE      1
#define KVM_DEV_VFIO_FILE_ADD  1
#define KVM_DEV_VFIO_FILE_DEL  2
#define KVM_DEV_VFIO_GROUP     1
#define KVM_DEV_VFIO_GROUP_ADD 1
#define KVM_DEV_VFIO_GROUP_DEL 2

/* vCPU attributes (devices/vcpu.rst, 4): the group and its attribute. */
#define KVM_VCPU_TSC_CTRL   0
#define KVM_VCPU_TSC_OFFSET 0

/* PMU event filter: KVM_SET_PMU_EVENT_FILTER (4.120); masked events since v6.3. */
struct kvm_pmu_event_filter {
	uint32_t action;
	uint32_t nevents;
	uint32_t fixed_counter_bitmap;
	uint32_t flags;
	uint32_t pad[4];
	uint64_t events[];
};

#define KVM_PMU_EVENT_ALLOW		 0
#define KVM_PMU_EVENT_DENY		 1
#define KVM_PMU_EVENT_FLAG_MASKED_EVENTS 0x1
#define KVM_PMU_EVENT_FLAGS_VALID_MASK	 0x1

/* Nested virtualisation: KVM_GET_NESTED_STATE (4.114), KVM_SET_NESTED_STATE (4.115). */
#define KVM_STATE_NESTED_FORMAT_VMX		0
#define KVM_STATE_NESTED_FORMAT_SVM		1
#define KVM_STATE_NESTED_GUEST_MODE		0x1
#define KVM_STATE_NESTED_RUN_PENDING		0x2
#define KVM_STATE_NESTED_EVMCS			0x4
#define KVM_STATE_NESTED_MTF_PENDING		0x8
#define KVM_STATE_NESTED_GIF_SET		0x100
#define KVM_STATE_NESTED_SMM_GUEST_MODE		0x1
#define KVM_STATE_NESTED_SMM_VMXON		0x2
#define KVM_STATE_NESTED_VMX_VMCS_SIZE		0x1000
#define KVM_STATE_NESTED_SVM_VMCB_SIZE		0x1000
#define KVM_STATE_VMX_PREEMPTION_TIMER_DEADLINE 0x1

struct kvm_vmx_nested_state_data {
	uint8_t vmcs12[4096];
	uint8_t shadow_vmcs12[4096];
};

struct kvm_vmx_nested_state_hdr_smm {
	uint16_t flags;
};

struct kvm_vmx_nested_state_hdr {
	uint64_t vmxon_pa;
	uint64_t vmcs12_pa;
	struct kvm_vmx_nested_state_hdr_smm smm;
	uint16_t pad;
	uint32_t flags;
	uint64_t preemption_timer_deadline;
};

struct kvm_svm_nested_state_data {
	uint8_t vmcb12[4096];
};

struct kvm_svm_nested_state_hdr {
	uint64_t vmcb_pa;
};

union kvm_nested_state_hdr {
	struct kvm_vmx_nested_state_hdr vmx;
	struct kvm_svm_nested_state_hdr svm;
	uint8_t pad[120];
};

/*
 * `data` is kvm_vmx_nested_state_data or kvm_svm_nested_state_data by `format`, `size` bytes with
 * this header.
 */
struct kvm_nested_state {
	uint16_t flags;
	uint16_t format;
	uint32_t size;
	union kvm_nested_state_hdr hdr;
	uint8_t data[];
};

/*
 * Statistics: KVM_GET_STATS_FD (4.133).  A descriptor is kvm_stats_desc plus name_size bytes of
 * name.
 */
struct kvm_stats_header {
	uint32_t flags;
	uint32_t name_size;
	uint32_t num_desc;
	uint32_t id_offset;
	uint32_t desc_offset;
	uint32_t data_offset;
};

struct kvm_stats_desc {
	uint32_t flags;
	int16_t exponent;
	uint16_t size;
	uint32_t offset;
	uint32_t bucket_size;
	char name[];
};

#define KVM_STATS_TYPE_SHIFT	   0
#define KVM_STATS_TYPE_MASK	   0xf
#define KVM_STATS_TYPE_CUMULATIVE  0x0
#define KVM_STATS_TYPE_INSTANT	   0x1
#define KVM_STATS_TYPE_PEAK	   0x2
#define KVM_STATS_TYPE_LINEAR_HIST 0x3
#define KVM_STATS_TYPE_LOG_HIST	   0x4
#define KVM_STATS_TYPE_MAX	   0x4
#define KVM_STATS_UNIT_SHIFT	   4
#define KVM_STATS_UNIT_MASK	   0xf0
#define KVM_STATS_UNIT_NONE	   0x0
#define KVM_STATS_UNIT_BYTES	   0x10
#define KVM_STATS_UNIT_SECONDS	   0x20
#define KVM_STATS_UNIT_CYCLES	   0x30
#define KVM_STATS_UNIT_BOOLEAN	   0x40
#define KVM_STATS_BASE_SHIFT	   8
#define KVM_STATS_BASE_MASK	   0xf00
#define KVM_STATS_BASE_POW10	   0x0
#define KVM_STATS_BASE_POW2	   0x100

/* Hyper-V: KVM_HYPERV_EVENTFD (4.113), KVM_EXIT_HYPERV. */
#define KVM_HYPERV_CONN_ID_MASK	    0xffffff
#define KVM_HYPERV_EVENTFD_DEASSIGN 0x1

struct kvm_hyperv_eventfd {
	uint32_t conn_id;
	int32_t fd;
	uint32_t flags;
	uint32_t padding[3];
};

#define KVM_EXIT_HYPERV_SYNIC  1
#define KVM_EXIT_HYPERV_HCALL  2
#define KVM_EXIT_HYPERV_SYNDBG 3

struct kvm_hyperv_exit_synic {
	uint32_t msr;
	uint32_t pad2;
	uint64_t control;
	uint64_t evt_page;
	uint64_t msg_page;
};

struct kvm_hyperv_exit_hcall {
	uint64_t input;
	uint64_t result;
	uint64_t params[2];
};

struct kvm_hyperv_exit_syndbg {
	uint32_t msr;
	uint32_t pad2;
	uint64_t control;
	uint64_t status;
	uint64_t send_page;
	uint64_t recv_page;
	uint64_t pending_page;
};

union kvm_hyperv_exit_u {
	struct kvm_hyperv_exit_synic synic;
	struct kvm_hyperv_exit_hcall hcall;
	struct kvm_hyperv_exit_syndbg syndbg;
};

struct kvm_hyperv_exit {
	uint32_t type;
	uint32_t pad1;
	union kvm_hyperv_exit_u u;
};

/*
 * Xen: KVM_CAP_XEN_HVM (8.30), KVM_XEN_HVM_CONFIG (4.28), attributes of the VM (4.126, 4.127) and
 * of a vCPU (4.128, 4.129), KVM_EXIT_XEN.
 */
#define KVM_XEN_HVM_CONFIG_HYPERCALL_MSR	0x1
#define KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL	0x2
#define KVM_XEN_HVM_CONFIG_SHARED_INFO		0x4
#define KVM_XEN_HVM_CONFIG_RUNSTATE		0x8
#define KVM_XEN_HVM_CONFIG_EVTCHN_2LEVEL	0x10
#define KVM_XEN_HVM_CONFIG_EVTCHN_SEND		0x20
#define KVM_XEN_HVM_CONFIG_RUNSTATE_UPDATE_FLAG 0x40
#define KVM_XEN_HVM_CONFIG_PVCLOCK_TSC_UNSTABLE 0x80
#define KVM_XEN_HVM_CONFIG_SHARED_INFO_HVA	0x100
#define KVM_XEN_MSR_MIN_INDEX			0x40000000
#define KVM_XEN_MSR_MAX_INDEX			0x4fffffff

struct kvm_xen_hvm_config {
	uint32_t flags;
	uint32_t msr;
	uint64_t blob_addr_32;
	uint64_t blob_addr_64;
	uint8_t blob_size_32;
	uint8_t blob_size_64;
	uint8_t pad2[30];
};

#define KVM_XEN_ATTR_TYPE_LONG_MODE	       0x0
#define KVM_XEN_ATTR_TYPE_SHARED_INFO	       0x1
#define KVM_XEN_ATTR_TYPE_UPCALL_VECTOR	       0x2
#define KVM_XEN_ATTR_TYPE_EVTCHN	       0x3
#define KVM_XEN_ATTR_TYPE_XEN_VERSION	       0x4
#define KVM_XEN_ATTR_TYPE_RUNSTATE_UPDATE_FLAG 0x5
#define KVM_XEN_ATTR_TYPE_SHARED_INFO_HVA      0x6
#define KVM_XEN_EVTCHN_DEASSIGN		       0x1
#define KVM_XEN_EVTCHN_UPDATE		       0x2
#define KVM_XEN_EVTCHN_RESET		       0x4
#define KVM_XEN_INVALID_GFN		       0xffffffffffffffff

union kvm_xen_hvm_attr_shared_info {
	uint64_t gfn;
	uint64_t hva;
};

struct kvm_xen_hvm_attr_evtchn_port {
	uint32_t port;
	uint32_t vcpu;
	uint32_t priority;
};

struct kvm_xen_hvm_attr_evtchn_eventfd {
	uint32_t port;
	int32_t fd;
};

union kvm_xen_hvm_attr_evtchn_deliver {
	struct kvm_xen_hvm_attr_evtchn_port port;
	struct kvm_xen_hvm_attr_evtchn_eventfd eventfd;
	uint32_t padding[4];
};

struct kvm_xen_hvm_attr_evtchn {
	uint32_t send_port;
	uint32_t type;
	uint32_t flags;
	union kvm_xen_hvm_attr_evtchn_deliver deliver;
};

union kvm_xen_hvm_attr_u {
	uint8_t long_mode;
	uint8_t vector;
	uint8_t runstate_update_flag;
	union kvm_xen_hvm_attr_shared_info shared_info;
	struct kvm_xen_hvm_attr_evtchn evtchn;
	uint32_t xen_version;
	uint64_t pad[8];
};

struct kvm_xen_hvm_attr {
	uint16_t type;
	uint16_t pad[3];
	union kvm_xen_hvm_attr_u u;
};

#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO	0x0
#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_TIME_INFO	0x1
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADDR	0x2
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_CURRENT 0x3
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_DATA	0x4
#define KVM_XEN_VCPU_ATTR_TYPE_RUNSTATE_ADJUST	0x5
#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_ID		0x6
#define KVM_XEN_VCPU_ATTR_TYPE_TIMER		0x7
#define KVM_XEN_VCPU_ATTR_TYPE_UPCALL_VECTOR	0x8
#define KVM_XEN_VCPU_ATTR_TYPE_VCPU_INFO_HVA	0x9
#define KVM_XEN_INVALID_GPA			0xffffffffffffffff

struct kvm_xen_vcpu_attr_runstate {
	uint64_t state;
	uint64_t state_entry_time;
	uint64_t time_running;
	uint64_t time_runnable;
	uint64_t time_blocked;
	uint64_t time_offline;
};

struct kvm_xen_vcpu_attr_timer {
	uint32_t port;
	uint32_t priority;
	uint64_t expires_ns;
};

union kvm_xen_vcpu_attr_u {
	uint64_t gpa;
	uint64_t hva;
	uint64_t pad[8];
	struct kvm_xen_vcpu_attr_runstate runstate;
	uint32_t vcpu_id;
	struct kvm_xen_vcpu_attr_timer timer;
	uint8_t vector;
};

struct kvm_xen_vcpu_attr {
	uint16_t type;
	uint16_t pad[3];
	union kvm_xen_vcpu_attr_u u;
};

#define KVM_EXIT_XEN_HCALL 1

struct kvm_xen_exit_hcall {
	uint32_t longmode;
	uint32_t cpl;
	uint64_t input;
	uint64_t result;
	uint64_t params[6];
};

union kvm_xen_exit_u {
	struct kvm_xen_exit_hcall hcall;
};

struct kvm_xen_exit {
	uint32_t type;
	union kvm_xen_exit_u u;
};

/*
 * Encrypted guests: KVM_MEMORY_ENCRYPT_OP (4.110), KVM_MEMORY_ENCRYPT_{REG,UNREG}_REGION (4.111,
 * 4.112).
 */
struct kvm_enc_region {
	uint64_t addr;
	uint64_t size;
};

/*
 * SEV (x86/amd-memory-encryption.rst): the command in kvm_sev_cmd.id, its argument at
 * kvm_sev_cmd.data.  INIT2 since v6.10, SNP v6.11.
 */
#define KVM_SEV_INIT		       0
#define KVM_SEV_ES_INIT		       1
#define KVM_SEV_LAUNCH_START	       2
#define KVM_SEV_LAUNCH_UPDATE_DATA     3
#define KVM_SEV_LAUNCH_UPDATE_VMSA     4
#define KVM_SEV_LAUNCH_SECRET	       5
#define KVM_SEV_LAUNCH_MEASURE	       6
#define KVM_SEV_LAUNCH_FINISH	       7
#define KVM_SEV_SEND_START	       8
#define KVM_SEV_SEND_UPDATE_DATA       9
#define KVM_SEV_SEND_UPDATE_VMSA       10
#define KVM_SEV_SEND_FINISH	       11
#define KVM_SEV_RECEIVE_START	       12
#define KVM_SEV_RECEIVE_UPDATE_DATA    13
#define KVM_SEV_RECEIVE_UPDATE_VMSA    14
#define KVM_SEV_RECEIVE_FINISH	       15
#define KVM_SEV_GUEST_STATUS	       16
#define KVM_SEV_DBG_DECRYPT	       17
#define KVM_SEV_DBG_ENCRYPT	       18
#define KVM_SEV_CERT_EXPORT	       19
#define KVM_SEV_GET_ATTESTATION_REPORT 20
#define KVM_SEV_SEND_CANCEL	       21
#define KVM_SEV_INIT2		       22
#define KVM_SEV_SNP_LAUNCH_START       100
#define KVM_SEV_SNP_LAUNCH_UPDATE      101
#define KVM_SEV_SNP_LAUNCH_FINISH      102

struct kvm_sev_cmd {
	uint32_t id;
	uint32_t pad0;
	uint64_t data;
	uint32_t error;
	uint32_t sev_fd;
};

struct kvm_sev_init {
	uint64_t vmsa_features;
	uint32_t flags;
	uint16_t ghcb_version;
	uint16_t pad1;
	uint32_t pad2[8];
};

struct kvm_sev_launch_start {
	uint32_t handle;
	uint32_t policy;
	uint64_t dh_uaddr;
	uint32_t dh_len;
	uint32_t pad0;
	uint64_t session_uaddr;
	uint32_t session_len;
	uint32_t pad1;
};

struct kvm_sev_launch_update_data {
	uint64_t uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_launch_secret {
	uint64_t hdr_uaddr;
	uint32_t hdr_len;
	uint32_t pad0;
	uint64_t guest_uaddr;
	uint32_t guest_len;
	uint32_t pad1;
	uint64_t trans_uaddr;
	uint32_t trans_len;
	uint32_t pad2;
};

struct kvm_sev_launch_measure {
	uint64_t uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_guest_status {
	uint32_t handle;
	uint32_t policy;
	uint32_t state;
};

struct kvm_sev_dbg {
	uint64_t src_uaddr;
	uint64_t dst_uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_attestation_report {
	uint8_t mnonce[16];
	uint64_t uaddr;
	uint32_t len;
	uint32_t pad0;
};

struct kvm_sev_send_start {
	uint32_t policy;
	uint32_t pad0;
	uint64_t pdh_cert_uaddr;
	uint32_t pdh_cert_len;
	uint32_t pad1;
	uint64_t plat_certs_uaddr;
	uint32_t plat_certs_len;
	uint32_t pad2;
	uint64_t amd_certs_uaddr;
	uint32_t amd_certs_len;
	uint32_t pad3;
	uint64_t session_uaddr;
	uint32_t session_len;
	uint32_t pad4;
};

struct kvm_sev_send_update_data {
	uint64_t hdr_uaddr;
	uint32_t hdr_len;
	uint32_t pad0;
	uint64_t guest_uaddr;
	uint32_t guest_len;
	uint32_t pad1;
	uint64_t trans_uaddr;
	uint32_t trans_len;
	uint32_t pad2;
};

struct kvm_sev_receive_start {
	uint32_t handle;
	uint32_t policy;
	uint64_t pdh_uaddr;
	uint32_t pdh_len;
	uint32_t pad0;
	uint64_t session_uaddr;
	uint32_t session_len;
	uint32_t pad1;
};

struct kvm_sev_receive_update_data {
	uint64_t hdr_uaddr;
	uint32_t hdr_len;
	uint32_t pad0;
	uint64_t guest_uaddr;
	uint32_t guest_len;
	uint32_t pad1;
	uint64_t trans_uaddr;
	uint32_t trans_len;
	uint32_t pad2;
};

struct kvm_sev_snp_launch_start {
	uint64_t policy;
	uint8_t gosvw[16];
	uint16_t flags;
	uint8_t pad0[6];
	uint64_t pad1[4];
};

#define KVM_SEV_PAGE_TYPE_INVALID	 0x0
#define KVM_SEV_SNP_PAGE_TYPE_NORMAL	 0x1
#define KVM_SEV_SNP_PAGE_TYPE_ZERO	 0x3
#define KVM_SEV_SNP_PAGE_TYPE_UNMEASURED 0x4
#define KVM_SEV_SNP_PAGE_TYPE_SECRETS	 0x5
#define KVM_SEV_SNP_PAGE_TYPE_CPUID	 0x6

struct kvm_sev_snp_launch_update {
	uint64_t gfn_start;
	uint64_t uaddr;
	uint64_t len;
	uint8_t type;
	uint8_t pad0;
	uint16_t flags;
	uint32_t pad1;
	uint64_t pad2[4];
};

#define KVM_SEV_SNP_ID_BLOCK_SIZE    96
#define KVM_SEV_SNP_ID_AUTH_SIZE     4096
#define KVM_SEV_SNP_FINISH_DATA_SIZE 32

struct kvm_sev_snp_launch_finish {
	uint64_t id_block_uaddr;
	uint64_t id_auth_uaddr;
	uint8_t id_block_en;
	uint8_t auth_key_en;
	uint8_t vcek_disabled;
	uint8_t host_data[32];
	uint8_t pad0[3];
	uint16_t flags;
	uint64_t pad1[4];
};

/*
 * TDX (x86/intel-tdx.rst), since v6.16: the command in kvm_tdx_cmd.id, its argument at
 * kvm_tdx_cmd.data.
 */
#define KVM_TDX_CAPABILITIES	      0
#define KVM_TDX_INIT_VM		      1
#define KVM_TDX_INIT_VCPU	      2
#define KVM_TDX_INIT_MEM_REGION	      3
#define KVM_TDX_FINALIZE_VM	      4
#define KVM_TDX_GET_CPUID	      5
#define KVM_TDX_MEASURE_MEMORY_REGION 0x1

struct kvm_tdx_cmd {
	uint32_t id;
	uint32_t flags;
	uint64_t data;
	uint64_t hw_error;
};

struct kvm_tdx_capabilities {
	uint64_t supported_attrs;
	uint64_t supported_xfam;
	uint64_t kernel_tdvmcallinfo_1_r11;
	uint64_t user_tdvmcallinfo_1_r11;
	uint64_t kernel_tdvmcallinfo_1_r12;
	uint64_t user_tdvmcallinfo_1_r12;
	uint64_t reserved[250];
	struct kvm_cpuid2 cpuid;
};

struct kvm_tdx_init_vm {
	uint64_t attributes;
	uint64_t xfam;
	uint64_t mrconfigid[6];
	uint64_t mrowner[6];
	uint64_t mrownerconfig[6];
	uint64_t reserved[12];
	struct kvm_cpuid2 cpuid;
};

struct kvm_tdx_init_mem_region {
	uint64_t source_addr;
	uint64_t gpa;
	uint64_t nr_pages;
};

/*
 * Hypercalls a program meets at KVM_EXIT_HYPERCALL (x86/hypercalls.rst), and the attributes of
 * MAP_GPA_RANGE.
 */
#define KVM_HC_VAPIC_POLL_IRQ	     1
#define KVM_HC_MMU_OP		     2
#define KVM_HC_FEATURES		     3
#define KVM_HC_KICK_CPU		     5
#define KVM_HC_CLOCK_PAIRING	     9
#define KVM_HC_SEND_IPI		     10
#define KVM_HC_SCHED_YIELD	     11
#define KVM_HC_MAP_GPA_RANGE	     12
#define KVM_MAP_GPA_RANGE_PAGE_SZ_4K 0
#define KVM_MAP_GPA_RANGE_PAGE_SZ_2M 0x1
#define KVM_MAP_GPA_RANGE_PAGE_SZ_1G 0x2
#define KVM_MAP_GPA_RANGE_ENCRYPTED  0x10
#define KVM_MAP_GPA_RANGE_DECRYPTED  0x0

/* KVM's own CPUID leaves and feature bits (x86/cpuid.rst), KVM's own MSRs (x86/msr.rst). */
#define KVM_CPUID_SIGNATURE		   0x40000000
#define KVM_CPUID_FEATURES		   0x40000001
#define KVM_FEATURE_CLOCKSOURCE		   0
#define KVM_FEATURE_NOP_IO_DELAY	   1
#define KVM_FEATURE_MMU_OP		   2
#define KVM_FEATURE_CLOCKSOURCE2	   3
#define KVM_FEATURE_ASYNC_PF		   4
#define KVM_FEATURE_STEAL_TIME		   5
#define KVM_FEATURE_PV_EOI		   6
#define KVM_FEATURE_PV_UNHALT		   7
#define KVM_FEATURE_PV_TLB_FLUSH	   9
#define KVM_FEATURE_ASYNC_PF_VMEXIT	   10
#define KVM_FEATURE_PV_SEND_IPI		   11
#define KVM_FEATURE_POLL_CONTROL	   12
#define KVM_FEATURE_PV_SCHED_YIELD	   13
#define KVM_FEATURE_ASYNC_PF_INT	   14
#define KVM_FEATURE_MSI_EXT_DEST_ID	   15
#define KVM_FEATURE_HC_MAP_GPA_RANGE	   16
#define KVM_FEATURE_MIGRATION_CONTROL	   17
#define KVM_FEATURE_CLOCKSOURCE_STABLE_BIT 24
#define KVM_HINTS_REALTIME		   0
#define MSR_KVM_WALL_CLOCK		   0x11
#define MSR_KVM_SYSTEM_TIME		   0x12
#define MSR_KVM_WALL_CLOCK_NEW		   0x4b564d00
#define MSR_KVM_SYSTEM_TIME_NEW		   0x4b564d01
#define MSR_KVM_ASYNC_PF_EN		   0x4b564d02
#define MSR_KVM_STEAL_TIME		   0x4b564d03
#define MSR_KVM_PV_EOI_EN		   0x4b564d04
#define MSR_KVM_POLL_CONTROL		   0x4b564d05
#define MSR_KVM_ASYNC_PF_INT		   0x4b564d06
#define MSR_KVM_ASYNC_PF_ACK		   0x4b564d07
#define MSR_KVM_MIGRATION_CONTROL	   0x4b564d08

/*
 * Registers shared through kvm_run: KVM_CAP_SYNC_REGS (6.74); KVM_SYNC_X86_* go into
 * kvm_valid_regs and kvm_dirty_regs.
 */
#define KVM_SYNC_X86_REGS	  0x1
#define KVM_SYNC_X86_SREGS	  0x2
#define KVM_SYNC_X86_EVENTS	  0x4
#define KVM_SYNC_X86_VALID_FIELDS 0x7
#define SYNC_REGS_SIZE_BYTES	  2048

struct kvm_sync_regs {
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct kvm_vcpu_events events;
};

/*
 * Exit reasons (section 5); one number space for all architectures.  MEMORY_FAULT since v6.8, TDX
 * since v6.16.
 */
#define KVM_EXIT_UNKNOWN	 0
#define KVM_EXIT_EXCEPTION	 1
#define KVM_EXIT_IO		 2
#define KVM_EXIT_HYPERCALL	 3
#define KVM_EXIT_DEBUG		 4
#define KVM_EXIT_HLT		 5
#define KVM_EXIT_MMIO		 6
#define KVM_EXIT_IRQ_WINDOW_OPEN 7
#define KVM_EXIT_SHUTDOWN	 8
#define KVM_EXIT_FAIL_ENTRY	 9
#define KVM_EXIT_INTR		 10
#define KVM_EXIT_SET_TPR	 11
#define KVM_EXIT_TPR_ACCESS	 12
#define KVM_EXIT_S390_SIEIC	 13
#define KVM_EXIT_S390_RESET	 14
#define KVM_EXIT_DCR		 15
#define KVM_EXIT_NMI		 16
#define KVM_EXIT_INTERNAL_ERROR	 17
#define KVM_EXIT_OSI		 18
#define KVM_EXIT_PAPR_HCALL	 19
#define KVM_EXIT_S390_UCONTROL	 20
#define KVM_EXIT_WATCHDOG	 21
#define KVM_EXIT_S390_TSCH	 22
#define KVM_EXIT_EPR		 23
#define KVM_EXIT_SYSTEM_EVENT	 24
#define KVM_EXIT_S390_STSI	 25
#define KVM_EXIT_IOAPIC_EOI	 26
#define KVM_EXIT_HYPERV		 27
#define KVM_EXIT_ARM_NISV	 28
#define KVM_EXIT_X86_RDMSR	 29
#define KVM_EXIT_X86_WRMSR	 30
#define KVM_EXIT_DIRTY_RING_FULL 31
#define KVM_EXIT_AP_RESET_HOLD	 32
#define KVM_EXIT_X86_BUS_LOCK	 33
#define KVM_EXIT_XEN		 34
#define KVM_EXIT_RISCV_SBI	 35
#define KVM_EXIT_RISCV_CSR	 36
#define KVM_EXIT_NOTIFY		 37
#define KVM_EXIT_LOONGARCH_IOCSR 38
#define KVM_EXIT_MEMORY_FAULT	 39
#define KVM_EXIT_TDX		 40

/* What each exit says beyond its reason. */
#define KVM_EXIT_IO_IN					    0
#define KVM_EXIT_IO_OUT					    1
#define KVM_EXIT_HYPERCALL_LONG_MODE			    0x1
#define KVM_INTERNAL_ERROR_EMULATION			    1
#define KVM_INTERNAL_ERROR_SIMUL_EX			    2
#define KVM_INTERNAL_ERROR_DELIVERY_EV			    3
#define KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON	    4
#define KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES 0x1
#define KVM_SYSTEM_EVENT_SHUTDOWN			    1
#define KVM_SYSTEM_EVENT_RESET				    2
#define KVM_SYSTEM_EVENT_CRASH				    3
#define KVM_SYSTEM_EVENT_WAKEUP				    4
#define KVM_SYSTEM_EVENT_SUSPEND			    5
#define KVM_SYSTEM_EVENT_SEV_TERM			    6
#define KVM_SYSTEM_EVENT_TDX_FATAL			    7
#define KVM_NOTIFY_CONTEXT_INVALID			    0x1
#define KVM_MEMORY_EXIT_FLAG_PRIVATE			    0x8

/* Bits of kvm_run.flags; GUEST_MODE since v6.11. */
#define KVM_RUN_X86_SMM	       0x1
#define KVM_RUN_X86_BUS_LOCK   0x2
#define KVM_RUN_X86_GUEST_MODE 0x4

/* The members of kvm_run's exit union, one per reason. */
struct kvm_run_hw {
	uint64_t hardware_exit_reason;
};

struct kvm_run_fail_entry {
	uint64_t hardware_entry_failure_reason;
	uint32_t cpu;
};

struct kvm_run_ex {
	uint32_t exception;
	uint32_t error_code;
};

/* `count` elements of `size` bytes at kvm_run + data_offset. */
struct kvm_run_io {
	uint8_t direction;
	uint8_t size;
	uint16_t port;
	uint32_t count;
	uint64_t data_offset;
};

struct kvm_run_debug {
	struct kvm_debug_exit_arch arch;
};

struct kvm_run_mmio {
	uint64_t phys_addr;
	uint8_t data[8];
	uint32_t len;
	uint8_t is_write;
};

struct kvm_run_iocsr_io {
	uint64_t phys_addr;
	uint8_t data[8];
	uint32_t len;
	uint8_t is_write;
};

struct kvm_run_hypercall {
	uint64_t nr;
	uint64_t args[6];
	uint64_t ret;
	union {
		uint32_t longmode;
		uint64_t flags;
	};
};

struct kvm_run_tpr_access {
	uint64_t rip;
	uint32_t is_write;
	uint32_t pad;
};

struct kvm_run_s390_sieic {
	uint8_t icptcode;
	uint16_t ipa;
	uint32_t ipb;
};

struct kvm_run_s390_ucontrol {
	uint64_t trans_exc_code;
	uint32_t pgm_code;
};

struct kvm_run_dcr {
	uint32_t dcrn;
	uint32_t data;
	uint8_t is_write;
};

struct kvm_run_internal {
	uint32_t suberror;
	uint32_t ndata;
	uint64_t data[16];
};

/*
 * The same bytes as `internal`, for KVM_INTERNAL_ERROR_EMULATION; insn_* hold only if `flags` says
 * so (KVM_INTERNAL_ERROR_EMULATION_FLAG_*).
 */
struct kvm_run_emulation_failure {
	uint32_t suberror;
	uint32_t ndata;
	uint64_t flags;
	uint8_t insn_size;
	uint8_t insn_bytes[15];
};

struct kvm_run_osi {
	uint64_t gprs[32];
};

struct kvm_run_papr_hcall {
	uint64_t nr;
	uint64_t ret;
	uint64_t args[9];
};

struct kvm_run_s390_tsch {
	uint16_t subchannel_id;
	uint16_t subchannel_nr;
	uint32_t io_int_parm;
	uint32_t io_int_word;
	uint32_t ipb;
	uint8_t dequeued;
};

struct kvm_run_epr {
	uint32_t epr;
};

struct kvm_run_system_event {
	uint32_t type;
	uint32_t ndata;
	union {
		uint64_t flags;
		uint64_t data[16];
	};
};

struct kvm_run_s390_stsi {
	uint64_t addr;
	uint8_t ar;
	uint8_t reserved;
	uint8_t fc;
	uint8_t sel1;
	uint16_t sel2;
};

struct kvm_run_eoi {
	uint8_t vector;
};

struct kvm_run_arm_nisv {
	uint64_t esr_iss;
	uint64_t fault_ipa;
};

struct kvm_run_msr {
	uint8_t error;
	uint8_t pad[7];
	uint32_t reason;
	uint32_t index;
	uint64_t data;
};

struct kvm_run_riscv_sbi {
	unsigned long extension_id;
	unsigned long function_id;
	unsigned long args[6];
	unsigned long ret[2];
};

struct kvm_run_riscv_csr {
	unsigned long csr_num;
	unsigned long new_value;
	unsigned long write_mask;
	unsigned long ret_value;
};

struct kvm_run_notify {
	uint32_t flags;
};

struct kvm_run_memory_fault {
	uint64_t flags;
	uint64_t gpa;
	uint64_t size;
};

struct kvm_run_tdx_unknown {
	uint64_t ret;
	uint64_t data[5];
};

struct kvm_run_tdx_get_quote {
	uint64_t ret;
	uint64_t gpa;
	uint64_t size;
};

struct kvm_run_tdx_get_tdvmcall_info {
	uint64_t ret;
	uint64_t leaf;
	uint64_t r11;
	uint64_t r12;
	uint64_t r13;
	uint64_t r14;
};

struct kvm_run_tdx_setup_event_notify {
	uint64_t ret;
	uint64_t vector;
};

struct kvm_run_tdx {
	uint64_t flags;
	uint64_t nr;
	union {
		struct kvm_run_tdx_unknown unknown;
		struct kvm_run_tdx_get_quote get_quote;
		struct kvm_run_tdx_get_tdvmcall_info get_tdvmcall_info;
		struct kvm_run_tdx_setup_event_notify setup_event_notify;
	};
};

union kvm_run_s {
	struct kvm_sync_regs regs;
	char padding[2048];
};

/*
 * KVM_RUN (4.10, 5): the first page of the vCPU's mapping.  `request_interrupt_window` and
 * `immediate_exit` are ours to write.
 */
struct kvm_run {
	uint8_t request_interrupt_window;
	uint8_t immediate_exit;
	uint8_t padding1[6];
	uint32_t exit_reason;
	uint8_t ready_for_interrupt_injection;
	uint8_t if_flag;
	uint16_t flags;
	uint64_t cr8;
	uint64_t apic_base;
	union {
		struct kvm_run_hw hw;
		struct kvm_run_fail_entry fail_entry;
		struct kvm_run_ex ex;
		struct kvm_run_io io;
		struct kvm_run_debug debug;
		struct kvm_run_mmio mmio;
		struct kvm_run_iocsr_io iocsr_io;
		struct kvm_run_hypercall hypercall;
		struct kvm_run_tpr_access tpr_access;
		struct kvm_run_s390_sieic s390_sieic;
		uint64_t s390_reset_flags;
		struct kvm_run_s390_ucontrol s390_ucontrol;
		struct kvm_run_dcr dcr;
		struct kvm_run_internal internal;
		struct kvm_run_emulation_failure emulation_failure;
		struct kvm_run_osi osi;
		struct kvm_run_papr_hcall papr_hcall;
		struct kvm_run_s390_tsch s390_tsch;
		struct kvm_run_epr epr;
		struct kvm_run_system_event system_event;
		struct kvm_run_s390_stsi s390_stsi;
		struct kvm_run_eoi eoi;
		struct kvm_hyperv_exit hyperv;
		struct kvm_run_arm_nisv arm_nisv;
		struct kvm_run_msr msr;
		struct kvm_xen_exit xen;
		struct kvm_run_riscv_sbi riscv_sbi;
		struct kvm_run_riscv_csr riscv_csr;
		struct kvm_run_notify notify;
		struct kvm_run_memory_fault memory_fault;
		struct kvm_run_tdx tdx;
		char padding[256];
	};
	uint64_t kvm_valid_regs;
	uint64_t kvm_dirty_regs;
	union kvm_run_s s;
};
