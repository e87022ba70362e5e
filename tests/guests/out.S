/*
 * out: COUNT writes of SIZE bytes to PORT, the value going up by one each time; then hlt.  Real mode.
 *
 *	PORT (0x10)  SIZE 1, 2 or 4 (1)  VALUE, of the first write (0x44332211)  COUNT (1)
 */
#ifndef PORT
#define PORT	0x10
#endif
#ifndef SIZE
#define SIZE	1
#endif
#ifndef VALUE
#define VALUE	0x44332211
#endif
#ifndef COUNT
#define COUNT	1
#endif
	.code16
	.text
	.globl	_start
_start:
	cli
	mov	$PORT, %dx
	mov	$VALUE, %eax
	mov	$COUNT, %ecx
1:
#if SIZE == 1
	out	%al, %dx
#elif SIZE == 2
	out	%ax, %dx
#else
	out	%eax, %dx
#endif
	inc	%eax
	addr32	loop 1b
	hlt
