/*
 * steps64: climbs to 64-bit CPL0, and there a little of everything that a single step can meet.
 *
 * Calls, a loop, a string instruction with REP, flags pushed and popped, a fault (#UD) that its handler
 * skips, ports written.  Ends with a write of 0 to DONE.  The vCPU's CPUID must have LM.
 *
 *	DONE (0xf4)	QEMU's isa-debug-exit
 *	FREE (0x80)	a port that does no harm
 */
#ifndef DONE
#define DONE	0xf4
#endif
#define FREE	0x80
#include "modes.h"
	.set	IDT, 0x17000

	.text
	.globl	_start
_start:
	real_mode_setup
	enter_protected_mode
	enter_long_mode
	movl	$undefined, IDT + 16 * 6
	movl	$undefined, IDT + 16 * 6 + 4
	movw	$CODE64, IDT + 16 * 6 + 2
	movw	$0x8e00, IDT + 16 * 6 + 4		/* present, interrupt gate */
	movl	$0, IDT + 16 * 6 + 6
	movl	$0, IDT + 16 * 6 + 10
	lidt	idt_pointer
	mov	$3, %ecx
1:	call	double
	loop	1b
	ud2
	pushfq
	popfq
	mov	$_start, %esi
	mov	$0x600, %edi
	mov	$5, %ecx
	rep	movsb
	out	%al, $FREE
	push	$0x12
	pop	%rbx
	xor	%al, %al
	out	%al, $DONE
	hlt

double:	add	%rbx, %rbx
	ret
undefined:
	push	%rbp
	mov	%rsp, %rbp
	addq	$2, 8(%rbp)			/* past the ud2 */
	pop	%rbp
	iretq

	descriptor_tables
idt_pointer:
	.word	16 * 7 - 1
	.quad	IDT
	.org	510
	.word	0xaa55
