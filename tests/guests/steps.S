/*
 * steps: real mode; a little of everything that a single step can meet, always the same way through.
 *
 * Calls, a loop, a far jump, string instructions with and without REP, a software interrupt, flags pushed
 * and popped, a fault (#UD) that its handler skips, a port written.  Ends with a write of 0 to DONE.
 *
 *	DONE (0xf4)	QEMU's isa-debug-exit
 *	FREE (0x80)	a port that does no harm
 */
#ifndef DONE
#define DONE	0xf4
#endif
#define FREE	0x80

	.code16
	.text
	.globl	_start
_start:
	cli
	cld
	ljmp	$0, $1f
1:	xor	%ax, %ax
	mov	%ax, %ds
	mov	%ax, %es
	mov	%ax, %ss
	mov	$0x7c00, %sp
	movw	$interrupt, 4 * 0x40
	movw	%ax, 4 * 0x40 + 2
	movw	$undefined, 4 * 6
	movw	%ax, 4 * 6 + 2

	mov	$3, %cx
2:	call	double
	loop	2b
	int	$0x40
	ud2
	pushf
	popf
	mov	$_start, %si
	mov	$0x600, %di
	lodsb
	stosb
	mov	$5, %cx
	rep	movsb
	mov	$0x600, %di
	mov	$_start, %si
	mov	$6, %cx
	repe	cmpsb
	out	%al, $FREE
	push	$0x12
	pop	%bx
	enter	$8, $0
	leave
	xor	%al, %al
	out	%al, $DONE
	hlt

double:	add	%bx, %bx
	ret
interrupt:
	inc	%dx
	iret
undefined:
	push	%bp
	mov	%sp, %bp
	addw	$2, 2(%bp)			/* past the ud2 */
	pop	%bp
	iret
	.org	510
	.word	0xaa55
