/*
 * user: climbs to CPL3 in long mode, and writes AL to a port or to an address for ever.  One exit per turn.
 *
 * The port is open to CPL3 through the I/O bitmap of the TSS and not through IOPL 3, which not every
 * KVM honours.  The vCPU's CPUID must have LM.
 *
 *	PORT	the port (0x10)
 *	MMIO	if set, write one byte to guest-physical MMIO_GPA (0xd0000000) instead
 *	CHANGE	if set, every byte is one more than the last
 */
#ifndef PORT
#define PORT	0x10
#endif
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	enter_protected_mode
	enter_long_mode
	enter_user_mode
	mov	$PORT, %edx
	mov	$MMIO_VA, %edi
	mov	$0x55, %eax
1:
#ifdef MMIO
	mov	%al, (%rdi)
#else
	out	%al, %dx
#endif
#ifdef CHANGE
	inc	%al
#endif
	jmp	1b

	descriptor_tables
