/*
 * mmio: one read or write of SIZE bytes at guest-physical GPA, from 32-bit protected mode; then hlt.
 *
 * A write sends the bytes 0x11, 0x22, ... 0x88 (and on to 0xff, 0x00 for 16).  What a read brought is
 * written to REPORT in pieces of 4 bytes (1 and 2 bytes: one piece, the rest of it 0xaa).  16 bytes are
 * two exits of 8.
 *
 *	GPA, where there is no memslot (0xd0000000)  SIZE 1, 2, 4, 8 or 16 (4)  WRITE, if set  REPORT (0x11)
 */
#ifndef GPA
#define GPA	0xd0000000
#endif
#ifndef SIZE
#define SIZE	4
#endif
#ifndef REPORT
#define REPORT	0x11
#endif
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	enter_protected_mode
	mov	%cr4, %eax
	or	$CR4_OSFXSR, %eax
	mov	%eax, %cr4
	mov	$GPA, %edi
#ifdef WRITE
	mov	bytes, %eax
#if SIZE == 1
	mov	%al, (%edi)
#elif SIZE == 2
	mov	%ax, (%edi)
#elif SIZE == 4
	mov	%eax, (%edi)
#elif SIZE == 8
	movq	bytes, %mm0
	movq	%mm0, (%edi)
#else
	movups	bytes, %xmm0
	movups	%xmm0, (%edi)
#endif
#else
	mov	$0xaaaaaaaa, %eax
#if SIZE == 1
	mov	(%edi), %al
#elif SIZE == 2
	mov	(%edi), %ax
#elif SIZE == 4
	mov	(%edi), %eax
#elif SIZE == 8
	movq	(%edi), %mm0
	movq	%mm0, bytes
#else
	movups	(%edi), %xmm0
	movups	%xmm0, bytes
#endif
#if SIZE < 8
	mov	%eax, bytes
#endif
	mov	$bytes, %esi
	mov	$REPORT, %edx
	mov	$(SIZE + 3) / 4, %ecx
1:	lodsl
	out	%eax, %dx
	loop	1b
#endif
	hlt

	.balign	16
bytes:	.byte	0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88
	.byte	0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff, 0x00

	descriptor_tables
