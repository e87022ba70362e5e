/*
 * touch: writes the byte 0x5a to the first byte of every STEP-th page, COUNT times, from guest-physical
 * START; then hlt.  32-bit protected mode.
 *
 *	START (0x100000)  STEP in pages (1)  COUNT (16)
 */
#ifndef START
#define START	0x100000
#endif
#ifndef STEP
#define STEP	1
#endif
#ifndef COUNT
#define COUNT	16
#endif
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	enter_protected_mode
	mov	$START, %edi
	mov	$COUNT, %ecx
1:	movb	$0x5a, (%edi)
	add	$STEP * 0x1000, %edi
	loop	1b
	hlt

	descriptor_tables
