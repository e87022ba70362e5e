/*
 * pio: writes AL to a port for ever, in real mode.  One exit per turn.
 *
 *	PORT	the port (0x10)
 *	CHANGE	if set, every byte is one more than the last
 */
#ifndef PORT
#define PORT	0x10
#endif
	.code16
	.text
	.globl	_start
_start:
	mov	$PORT, %dx
	mov	$0x55, %al
1:	out	%al, %dx
#ifdef CHANGE
	inc	%al
#endif
	jmp	1b
