/*
 * debug_exit: writes CODE to QEMU's debug-exit port, and spins if that does not end it.  Real mode.
 *
 *	PORT (0xf4)  CODE (0x10)
 */
#ifndef PORT
#define PORT	0xf4
#endif
#ifndef CODE
#define CODE	0x10
#endif
	.code16
	.text
	.globl	_start
_start:
	cli
	mov	$PORT, %dx
	mov	$CODE, %al
	out	%al, %dx
	jmp	.
