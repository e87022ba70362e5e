/*
 * internal_error: an instruction that KVM must emulate and cannot (KVM_EXIT_INTERNAL_ERROR, suberror 1).
 *
 *	FETCH	if set, run into guest-physical GPA, where there is no memslot: no instruction bytes are known.
 *		Otherwise `popcnt` with its operand there: an instruction KVM's emulator does not have.
 *	GPA	(0xd0000000)
 */
#ifndef GPA
#define GPA	0xd0000000
#endif
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	enter_protected_mode
	mov	$GPA, %edi
#ifdef FETCH
	jmp	*%edi
#else
	popcnt	(%edi), %eax			/* f3 0f b8 07 */
	hlt
#endif

	descriptor_tables
