/*
 * climb: real mode -> protected mode -> long mode CPL0 -> CPL3, and back to CPL0 by an exception.
 *
 * Each stage writes its number to STAGE and what proves it to PROOF, 4 bytes:
 *	1	real mode		CR0 & PE = 0
 *	2	protected mode		CS = 0x08
 *	3	long mode CPL0		EFER.LMA and CS = 0x18, as LMA << 16 | CS = 0x10018
 *	4	long mode CPL3		CPL, as CS & 3 = 3 (kvm_pvm shows CPL3 the host's CS, not the guest's)
 *	5	the handler, CPL0	vector << 16 | CS of the interrupted code = vector << 16 | 0x2b
 * Then VECTOR_CODE gets the error code (0 where the exception has none), FAULT the offset of the saved RIP
 * from the instruction that trapped, and the guest halts.
 *
 *	TRAP	how CPL3 comes back: 6 ud2, 3 int3, 13 a hlt that CPL3 may not execute,
 *		14 a read of what is not mapped (6)
 *	STAGE (0x10)  PROOF (0x11)  VECTOR_CODE (0x12)  FAULT (0x13)
 */
#ifndef TRAP
#define TRAP	6
#endif
#define STAGE		0x10
#define PROOF		0x11
#define VECTOR_CODE	0x12
#define FAULT		0x13
#define UNMAPPED	0x80000000
#include "modes.h"

.macro	stage number
	push	%ax
	mov	$\number, %al
	out	%al, $STAGE
	pop	%ax
.endm

	.text
	.globl	_start
_start:
	real_mode_setup
	mov	%cr0, %eax
	and	$CR0_PE, %eax
	stage	1
	out	%eax, $PROOF

	enter_protected_mode
	xor	%eax, %eax
	mov	%cs, %ax
	stage	2
	out	%eax, $PROOF

	enter_long_mode
	lidt	idt_pointer
	mov	$MSR_EFER, %ecx
	rdmsr
	and	$1 << 10, %eax			/* LMA */
	shl	$6, %eax
	mov	%cs, %cx
	mov	%cx, %ax
	stage	3
	out	%eax, $PROOF

	enter_user_mode
	xor	%eax, %eax
	mov	%cs, %ax
	and	$3, %eax
	stage	4
	out	%eax, $PROOF
	mov	$UNMAPPED, %eax
trap:
#if TRAP == 6
	ud2
#elif TRAP == 3
	int3
#elif TRAP == 13
	hlt
#else
	mov	(%rax), %eax
#endif
	jmp	.

/* One stub per vector, each 16 bytes: makes the frames alike (vector, error code, then what the CPU pushed). */
	.balign	16
stubs:
	.set	vector, 0
	.rept	32
	.if	vector == 8 || (vector >= 10 && vector <= 14) || vector == 17
	.else
	pushq	$0
	.endif
	pushq	$vector
	jmp	back
	.balign	16
	.set	vector, vector + 1
	.endr

back:	pop	%rbx				/* vector */
	shl	$16, %ebx
	or	16(%rsp), %ebx			/* saved CS */
	mov	%ebx, %eax
	stage	5
	out	%eax, $PROOF
	pop	%rax				/* error code */
	out	%eax, $VECTOR_CODE
	mov	(%rsp), %eax			/* saved RIP */
	sub	$trap, %eax
	out	%eax, $FAULT
	hlt

	descriptor_tables

	.balign	8
idt:	.set	vector, 0
	.rept	32
	.word	stubs + 16 * vector, CODE64
	.byte	0, 0xee				/* 64-bit interrupt gate, DPL 3: int3 of CPL3 may use it */
	.word	0
	.quad	0
	.set	vector, vector + 1
	.endr
idt_pointer:
	.word	idt_pointer - idt - 1
	.quad	idt
