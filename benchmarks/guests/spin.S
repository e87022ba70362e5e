/* spin: a guest that never exits by itself (`jmp $`), in real mode. */
	.code16
	.text
	.globl	_start
_start:
	jmp	.
