/*
 * fault: for each of COUNT pages from START on: reads the first byte and writes it to port 0x10, then writes 0x77 to the
 * byte behind it.  At the end it writes 0xff to port 0x11, for ever.
 *
 *	USER	if set, from CPL3 in long mode; else from real mode by way of 32-bit protected mode
 *	START (0x100000)  COUNT (4)	below 2 MiB
 */
#ifndef START
#define START	0x100000
#endif
#ifndef COUNT
#define COUNT	4
#endif
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	enter_protected_mode
#ifdef USER
	enter_long_mode
	enter_user_mode
#endif
	mov	$START, %edi
	mov	$COUNT, %ecx
	mov	$0x10, %edx
1:	mov	(%edi), %al
	out	%al, %dx
	movb	$0x77, 1(%edi)
	add	$0x1000, %edi
	loop	1b
	mov	$0x11, %edx
	mov	$0xff, %al
2:	out	%al, %dx
	jmp	2b

	descriptor_tables
