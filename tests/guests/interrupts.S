/*
 * interrupts: handlers for NMI and the vectors 0x20..0x2f that write their vector to REPORT.  Real mode.
 * Interrupts are off at first; after a byte 0xff on REPORT they are on and the guest spins (or, with HALT
 * set, halts again and again).
 *
 *	REPORT (0x10)  HALT
 */
#ifndef REPORT
#define REPORT	0x10
#endif
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	movl	$nmi, 2 * 4
	mov	$0x20 * 4, %di
	mov	$handlers, %ax
1:	stosw
	movw	$0, (%di)
	add	$2, %di
	add	$4, %ax
	cmp	$0x30 * 4, %di
	jne	1b
	mov	$0xff, %al
	out	%al, $REPORT
	sti
spin:
#ifdef HALT
	hlt
#endif
	jmp	spin

nmi:	push	%ax
	mov	$2, %al
	jmp	report

	.balign	4
handlers:
	.set	vector, 0x20
	.rept	16
	push	%ax
	mov	$vector, %al
	.byte	0xeb, report - . - 1		/* jmp report, the short form whatever the assembler prefers */
	.balign	4
	.set	vector, vector + 1
	.endr
report:	out	%al, $REPORT
	pop	%ax
	iret
