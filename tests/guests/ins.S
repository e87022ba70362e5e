/*
 * ins: one `rep ins` of COUNT elements of SIZE bytes from PORT to 0x8000, then hlt.  Real mode.
 * KVM may ask for many elements in one exit.
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
	mov	%ax, %es
	mov	$0x8000, %di
	mov	$COUNT, %cx
	mov	$PORT, %dx
#if SIZE == 1
	rep	insb
#elif SIZE == 2
	rep	insw
#else
	rep	insl
#endif
	hlt
