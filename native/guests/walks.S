/*
 * walks: a list of memory accesses, each with its own control registers, page table and CPL.
 *
 * For a witness of page-table walks: the accesses are done by whatever runs this guest, and what came of each,
 * a value or an exception, is written beside it.  Between two accesses paging is off, so that an access finds an
 * empty TLB and no two need the same paging mode.
 *
 * A flat image, entered at 0x7C00 in real mode.  It climbs to 32-bit protected mode and stays in `idle`, one
 * jump to itself.  Whoever drives it writes `list` and `count` (physical address below 4 GiB, number of
 * records) and moves EIP from `idle` to `run`; when the list is done it is in `idle` again.
 *
 *	0x07c04	list, count		u32 each
 *	0x07c0c	idle, run		u32 each, addresses
 *
 *	record, 128 bytes
 *	 0 cr0	 4 cr4	 8 efer	12 pkru		u32 each; CR0.PG is in cr0, EFER.LME in efer
 *	16 cr3					u64
 *	24 gva					u64
 *	32 value				u64, what a store stores
 *	40 rflags				u32, only AC is of interest
 *	44 op	45 user	46 long	47 pke		u8 each: which access, at CPL3, EFER.LME, CR4.PKE
 *	48 entry				u32, page table to enter long mode with
 *	64 vector	68 error		u32 each: 0x80, done; else the exception
 *	72 cr2	80 value	88 rip	96 cs	u64 each: what RAX is, where it happened
 *
 *	op	0 load	 1 store  2 fetch (call of what stands there; it ends with int $0x80)
 *		3 exchange		 4 LAR of the first descriptor of an LDT at gva: an implicit supervisor read
 *
 * Every page table maps 0x7000-0xafff to itself, present, writable, accessed and dirty, 0xa000 for the user and
 * the rest not; those who enter long mode do so under `entry`.
 */
	.set	USER_PAGE, 0xa000
	.set	TSS32, 0x9c00
	.set	TSS64, 0x9d00
	.set	STACK, 0x9ff0

	.set	CODE32, 0x08
	.set	DATA32, 0x10
	.set	CODE64, 0x18
	.set	USER_CODE32, 0x20 | 3
	.set	USER_DATA, 0x28 | 3
	.set	USER_CODE64, 0x30 | 3
	.set	TSS32_SEL, 0x38
	.set	TSS64_SEL, 0x40			/* 16 bytes, as the next */
	.set	LDT_SEL, 0x50

	.set	CR0_OFF, 0x11			/* PE, ET */
	.set	MSR_EFER, 0xc0000080

	.set	IN, 64				/* bytes of a record before and after `vector` */
	.set	OUT, 64

	.code16
	.text
	.globl	_start
_start:	jmp	climb
	.org	4
list:	.long	0
count:	.long	0
	.long	idle
	.long	run

climb:	cli
	cld
	xor	%ax, %ax
	mov	%ax, %ds
	lgdtl	gdt_pointer
	mov	$CR0_OFF, %eax
	mov	%eax, %cr0
	ljmpl	$CODE32, $1f
	.code32
1:	mov	$DATA32, %eax
	mov	%eax, %ss
	mov	$USER_DATA, %eax		/* flat, and good at both CPLs */
	mov	%eax, %ds
	mov	%eax, %es
	mov	$STACK, %esp
	mov	$user_code, %esi
	mov	$USER_PAGE, %edi
	mov	$user_code_end - user_code, %ecx
	rep	movsb
	movl	$STACK, TSS32 + 4		/* ESP0, SS0 */
	movl	$DATA32, TSS32 + 8
	movl	$STACK, TSS64 + 4		/* RSP0 */
idle:	jmp	idle

/* ---- the list, in 32-bit mode without paging ---- */

run:	mov	list, %esi
next:	decl	count
	js	idle
	mov	$record, %edi
	mov	$IN / 4, %ecx
	rep	movsl
	mov	%esi, place
	xor	%eax, %eax
	mov	$out, %edi
	mov	$OUT / 4, %ecx
	rep	stosl

	mov	r_gva, %eax			/* the LDT, of which only LAR knows */
	mov	r_gva + 4, %edx
	mov	%ax, ldt_base
	shr	$16, %eax
	mov	%al, ldt_base + 2
	mov	%ah, ldt_base + 5
	mov	%edx, ldt_base + 6

	mov	r_cr4, %eax
	mov	%eax, %cr4
	mov	$MSR_EFER, %ecx
	mov	r_efer, %eax
	xor	%edx, %edx
	wrmsr
	cmpb	$0, r_pke
	je	1f
	xor	%ecx, %ecx
	mov	r_pkru, %eax
	wrpkru
1:	cmpb	$0, r_long
	jne	enter_long

	mov	r_cr3, %eax
	mov	%eax, %cr3
	mov	r_cr0, %eax
	mov	%eax, %cr0
	jmp	1f
1:	lidt	idt32_pointer
	andb	$~2, tss32_type
	mov	$TSS32_SEL, %eax
	ltr	%ax
	mov	$LDT_SEL, %eax
	lldt	%ax
	movzbl	r_op, %ecx
	mov	r_gva, %ebx
	mov	r_value, %eax
	mov	r_rflags, %edx
	cmpb	$0, r_user
	jne	1f
	push	%edx
	popf
	cmp	$2, %ecx
	je	2f
	shl	$4, %ecx
	add	$user32 - user_code + supervisor_code, %ecx
	jmp	*%ecx
2:	jmp	*%ebx

1:	push	$USER_DATA
	push	$STACK				/* not used */
	push	%edx
	push	$USER_CODE32
	cmp	$2, %ecx
	je	2f
	shl	$4, %ecx
	add	$user32 - user_code + USER_PAGE, %ecx
	push	%ecx
	iret
2:	push	%ebx
	iret

trap32:	mov	%eax, o_value
	pop	%eax
	mov	%eax, o_vector
	pop	%eax
	mov	%eax, o_error
	pop	%eax
	mov	%eax, o_rip
	pop	%eax
	mov	%eax, o_cs
	mov	%cr2, %eax
	mov	%eax, o_cr2

paging_off:
	mov	$STACK, %esp
	push	$2				/* no AC */
	popf
	mov	$CR0_OFF, %eax
	mov	%eax, %cr0
	jmp	1f
1:	xor	%eax, %eax
	xor	%edx, %edx
	mov	$MSR_EFER, %ecx
	wrmsr
	mov	%eax, %cr4
	mov	$out, %esi
	mov	place, %edi
	mov	$OUT / 4, %ecx
	rep	movsl
	mov	%edi, %esi
	jmp	next

enter_long:
	mov	r_entry, %eax
	mov	%eax, %cr3
	mov	r_cr0, %eax
	mov	%eax, %cr0
	ljmp	$CODE64, $1f

/* ---- 64-bit mode ---- */

	.code64
1:	mov	r_cr3, %rax
	mov	%rax, %cr3
	lidt	idt64_pointer
	andb	$~2, tss64_type
	mov	$TSS64_SEL, %eax
	ltr	%ax
	mov	$LDT_SEL, %eax
	lldt	%ax
	movzbl	r_op, %ecx
	mov	r_gva, %rbx
	mov	r_value, %rax
	mov	r_rflags, %edx
	cmpb	$0, r_user
	jne	1f
	push	%rdx
	popfq
	cmp	$2, %ecx
	je	2f
	shl	$4, %ecx
	add	$user64 - user_code + supervisor_code, %rcx
	jmp	*%rcx
2:	jmp	*%rbx

1:	pushq	$USER_DATA
	pushq	$STACK				/* not used */
	push	%rdx
	pushq	$USER_CODE64
	cmp	$2, %ecx
	je	2f
	shl	$4, %ecx
	add	$user64 - user_code + USER_PAGE, %rcx
	push	%rcx
	iretq
2:	push	%rbx
	iretq

trap64:	mov	%rax, o_value
	pop	%rax
	mov	%eax, o_vector
	pop	%rax
	mov	%eax, o_error
	pop	%rax
	mov	%rax, o_rip
	pop	%rax
	mov	%eax, o_cs
	mov	%cr2, %rax
	mov	%rax, o_cr2
	pushq	$CODE32
	pushq	$1f
	lretq
	.code32
1:	mov	$DATA32, %eax
	mov	%eax, %ss
	jmp	paging_off

/* ---- the accesses, 16 bytes each; copied to USER_PAGE for CPL3, here for CPL0 ---- */

	.balign	16
supervisor_code:
user_code:
user32:	mov	(%ebx), %eax
	int	$0x80
	.balign	16
	mov	%eax, (%ebx)
	int	$0x80
	.balign	16
	hlt
	.balign	16
	xchg	%eax, (%ebx)
	int	$0x80
	.balign	16
	mov	$4, %ecx			/* entry 0 of the LDT */
	xor	%eax, %eax
	lar	%ecx, %eax
	int	$0x80
	.balign	16
	.code64
user64:	mov	(%rbx), %rax
	int	$0x80
	.balign	16
	mov	%rax, (%rbx)
	int	$0x80
	.balign	16
	hlt
	.balign	16
	xchg	%rax, (%rbx)
	int	$0x80
	.balign	16
	mov	$4, %ecx
	xor	%eax, %eax
	lar	%ecx, %eax
	int	$0x80
	.balign	16
user_code_end:

/* ---- exceptions: those with an error code have it on the stack, the others a 0 ---- */

	.set	WITH_ERROR, 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17

	.code32
	.balign	16
entries32:
	.set	vector, 0
	.rept	32
	.balign	16
	.if	!(WITH_ERROR >> vector & 1)
	push	$0
	.endif
	push	$vector
	jmp	trap32
	.set	vector, vector + 1
	.endr
	.balign	16
	push	$0
	push	$0x80
	jmp	trap32

	.code64
	.balign	16
entries64:
	.set	vector, 0
	.rept	32
	.balign	16
	.if	!(WITH_ERROR >> vector & 1)
	pushq	$0
	.endif
	pushq	$vector
	jmp	trap64
	.set	vector, vector + 1
	.endr
	.balign	16
	pushq	$0
	pushq	$0x80
	jmp	trap64

	.balign	8
idt32:	.set	vector, 0
	.rept	32
	.word	0x7c00 + entries32 - _start + 16 * vector, CODE32, 0x8e00, 0
	.set	vector, vector + 1
	.endr
	.fill	(0x80 - 32) * 8
	.word	0x7c00 + entries32 - _start + 16 * 32, CODE32, 0xee00, 0
	.balign	8
idt64:	.set	vector, 0
	.rept	32
	.word	0x7c00 + entries64 - _start + 16 * vector, CODE64, 0x8e00, 0
	.quad	0
	.set	vector, vector + 1
	.endr
	.fill	(0x80 - 32) * 16
	.word	0x7c00 + entries64 - _start + 16 * 32, CODE64, 0xee00, 0
	.quad	0

	.balign	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff		/* CODE32 */
	.quad	0x00cf93000000ffff		/* DATA32 */
	.quad	0x00af9b000000ffff		/* CODE64 */
	.quad	0x00cffb000000ffff		/* USER_CODE32 */
	.quad	0x00cff3000000ffff		/* USER_DATA */
	.quad	0x00affb000000ffff		/* USER_CODE64 */
	.word	0x67, TSS32			/* TSS32_SEL */
	.byte	0
tss32_type:
	.byte	0x89, 0, 0
	.word	0x67, TSS64			/* TSS64_SEL */
	.byte	0
tss64_type:
	.byte	0x89, 0, 0
	.quad	0
	.word	0xffff				/* LDT_SEL */
ldt_base:
	.word	0
	.byte	0, 0x82, 0, 0
	.long	0, 0
gdt_end:
gdt_pointer:
	.word	gdt_end - gdt - 1
	.long	gdt
idt32_pointer:
	.word	0x81 * 8 - 1
	.long	idt32
idt64_pointer:
	.word	0x81 * 16 - 1
	.quad	idt64

	.balign	16
place:	.long	0
	.balign	16
record:
	.set	r_cr0, record
	.set	r_cr4, record + 4
	.set	r_efer, record + 8
	.set	r_pkru, record + 12
	.set	r_cr3, record + 16
	.set	r_gva, record + 24
	.set	r_value, record + 32
	.set	r_rflags, record + 40
	.set	r_op, record + 44
	.set	r_user, record + 45
	.set	r_long, record + 46
	.set	r_pke, record + 47
	.set	r_entry, record + 48
	.fill	IN
out:
	.set	o_vector, out
	.set	o_error, out + 4
	.set	o_cr2, out + 8
	.set	o_value, out + 16
	.set	o_rip, out + 24
	.set	o_cs, out + 32
	.fill	OUT
