/*
 * How a guest climbs: real mode -> protected mode -> long mode CPL0 -> CPL3.
 *
 * Macros for flat images linked at 0x7C00 and entered there in real mode.  Long mode needs a vCPU whose
 * CPUID has LM (KVM_SET_CPUID2 before the first KVM_RUN), or the write of EFER.LME is a #GP.
 *
 *	0x07c00	the image, with the GDT
 *	0x10000	PML4, 0x11000 PDPT, 0x12000 PD: the first 2 MiB identity mapped, open to CPL3
 *	0x13000	PD of the second GiB: MMIO_VA -> MMIO_GPA, 2 MiB, open to CPL3
 *	0x14000	TSS with an I/O bitmap that opens all ports to CPL3 (to 0x16068)
 *	0x1e000	stack of CPL0, downwards
 *	0x1f000	stack of CPL3, downwards
 */
	.set	PML4, 0x10000
	.set	PDPT, 0x11000
	.set	PD, 0x12000
	.set	PD_MMIO, 0x13000
	.set	TSS, 0x14000
	.set	TABLES_END, 0x17000
	.set	KERNEL_STACK, 0x1e000
	.set	USER_STACK, 0x1f000

#ifndef MMIO_GPA
#define MMIO_GPA	0xd0000000
#endif
	.set	MMIO_VA, 0x40000000

	.set	TSS_IO_BITMAP, 0x68
	.set	TSS_LIMIT, TSS_IO_BITMAP + 0x2000

	/* selectors */
	.set	CODE32, 0x08
	.set	DATA, 0x10
	.set	CODE64, 0x18
	.set	USER_DATA, 0x20 | 3
	.set	USER_CODE64, 0x28 | 3
	.set	TSS_SEL, 0x30

	.set	PTE_P, 1 << 0
	.set	PTE_RW, 1 << 1
	.set	PTE_US, 1 << 2
	.set	PTE_PS, 1 << 7
	.set	PTE_TABLE, PTE_P | PTE_RW | PTE_US
	.set	PTE_2M, PTE_TABLE | PTE_PS

	.set	CR0_PE, 1 << 0
	.set	CR0_PG, 1 << 31
	.set	CR4_PAE, 1 << 5
	.set	CR4_OSFXSR, 1 << 9
	.set	MSR_EFER, 0xc0000080
	.set	EFER_LME, 1 << 8

/* Real mode, any CS:IP that is linear 0x7C00 -> real mode with all segments 0 and a stack below the image. */
.macro	real_mode_setup
	.code16
	cli
	cld
	ljmp	$0, $1f
1:	xor	%ax, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	mov	$0x7c00, %sp
.endm

/* Real mode -> 32-bit protected mode, flat segments, no paging. */
.macro	enter_protected_mode
	lgdtl	gdt_pointer
	mov	%cr0, %eax
	or	$CR0_PE, %eax
	mov	%eax, %cr0
	ljmpl	$CODE32, $1f
	.code32
1:	mov	$DATA, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$KERNEL_STACK, %esp
.endm

/* 32-bit protected mode -> 64-bit CPL0, with the task register loaded. */
.macro	enter_long_mode
	mov	$PML4, %edi
	mov	$(TABLES_END - PML4) / 4, %ecx
	xor	%eax, %eax
	rep	stosl
	movl	$PDPT | PTE_TABLE, PML4
	movl	$PD | PTE_TABLE, PDPT
	movl	$PD_MMIO | PTE_TABLE, PDPT + 8
	movl	$PTE_2M, PD
	movl	$MMIO_GPA | PTE_2M, PD_MMIO
	movl	$KERNEL_STACK, TSS + 4			/* RSP0 */
	movw	$TSS_IO_BITMAP, TSS + 0x66
	movb	$0xff, TSS + TSS_LIMIT			/* the byte that must follow the bitmap */

	mov	%cr4, %eax
	or	$CR4_PAE, %eax
	mov	%eax, %cr4
	mov	$PML4, %eax
	mov	%eax, %cr3
	mov	$MSR_EFER, %ecx
	rdmsr
	or	$EFER_LME, %eax
	wrmsr
	mov	%cr0, %eax
	or	$CR0_PG, %eax
	mov	%eax, %cr0
	ljmp	$CODE64, $1f
	.code64
1:	mov	$TSS_SEL, %eax
	ltr	%ax
.endm

/* 64-bit CPL0 -> 64-bit CPL3 at the next instruction; interrupts stay off. */
.macro	enter_user_mode
	pushq	$USER_DATA
	pushq	$USER_STACK
	pushq	$2					/* RFLAGS: nothing but the bit that is always 1 */
	pushq	$USER_CODE64
	pushq	$1f
	iretq
1:
.endm

/* To be placed where the code does not run into it. */
.macro	descriptor_tables
	.balign	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff			/* CODE32: flat, DPL 0 */
	.quad	0x00cf93000000ffff			/* DATA: flat, DPL 0 */
	.quad	0x00af9b000000ffff			/* CODE64: DPL 0 */
	.quad	0x00cff3000000ffff			/* USER_DATA: flat, DPL 3 */
	.quad	0x00affb000000ffff			/* USER_CODE64: DPL 3 */
	.word	TSS_LIMIT, TSS & 0xffff, 0x8900 | (TSS >> 16), 0	/* TSS_SEL: 64-bit TSS, available */
	.quad	0
gdt_pointer:
	.word	gdt_pointer - gdt - 1
	.long	gdt
.endm
