/* triple: a triple fault, from protected mode with an empty IDT. */
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	enter_protected_mode
	lidtl	empty
	ud2

empty:	.word	0
	.long	0

	descriptor_tables
