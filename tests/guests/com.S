/*
 * com: reads the eight registers of the serial port at BASE in order and writes each byte read to REPORT;
 * then hlt.  Real mode.
 *
 *	BASE (0x3f8)  REPORT (0x10)
 */
#ifndef BASE
#define BASE	0x3f8
#endif
#ifndef REPORT
#define REPORT	0x10
#endif
	.code16
	.text
	.globl	_start
_start:
	cli
	mov	$BASE, %bx
1:	mov	%bx, %dx
	in	%dx, %al
	mov	$REPORT, %dx
	out	%al, %dx
	inc	%bx
	cmp	$BASE + 8, %bx
	jne	1b
	hlt
