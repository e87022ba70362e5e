/* halt: the shortest clean end, in real mode. */
	.code16
	.text
	.globl	_start
_start:
	cli
	hlt
