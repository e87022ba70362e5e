/*
 * outs: one `rep outs` of COUNT elements of SIZE bytes to PORT, then hlt.  Real mode.
 * The bytes sent are 1, 2, 3, ... in order; COUNT * SIZE is at most 255.
 *
 *	PORT (0x10)  SIZE 1, 2 or 4 (1)  COUNT (5)
 */
#ifndef PORT
#define PORT	0x10
#endif
#ifndef SIZE
#define SIZE	1
#endif
#ifndef COUNT
#define COUNT	5
#endif
	.code16
	.text
	.globl	_start
_start:
	cli
	cld
	xor	%ax, %ax
	mov	%ax, %ds
	mov	$bytes, %si
	mov	$COUNT, %cx
	mov	$PORT, %dx
#if SIZE == 1
	rep	outsb
#elif SIZE == 2
	rep	outsw
#else
	rep	outsl
#endif
	hlt

	.set	n, 0
bytes:	.rept	COUNT * SIZE
	.set	n, n + 1
	.byte	n
	.endr
