/*
 * in: COUNT times, reads SIZE bytes from PORT into an EAX of 0xaaaaaaaa and writes the whole EAX to REPORT;
 * then hlt.  Real mode.  So the bytes that the read must leave alone are seen too.
 *
 *	PORT (0x10)  SIZE 1, 2 or 4 (1)  REPORT (0x11)  COUNT (1)
 */
#ifndef PORT
#define PORT	0x10
#endif
#ifndef SIZE
#define SIZE	1
#endif
#ifndef REPORT
#define REPORT	0x11
#endif
#ifndef COUNT
#define COUNT	1
#endif
	.code16
	.text
	.globl	_start
_start:
	cli
	mov	$COUNT, %ecx
1:	mov	$0xaaaaaaaa, %eax
	mov	$PORT, %dx
#if SIZE == 1
	in	%dx, %al
#elif SIZE == 2
	in	%dx, %ax
#else
	in	%dx, %eax
#endif
	mov	$REPORT, %dx
	out	%eax, %dx
	addr32	loop 1b
	hlt
