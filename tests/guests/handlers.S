/*
 * handlers: code that is entered at 0x7C00 in the mode of BITS, at CPL 0 or CPL 3, takes the exception TRAP, and whose
 * handlers, at CPL 0, tell what they found and halt.  No stack is assumed before the exception.
 *
 *	BITS	64, 32, or 16 (virtual-8086 mode; the handlers are of 32 bits)
 *	WIDE	64 where the handlers are of 64 bits, else 32
 *	TRAP	6 ud2, 3 int3, 13 hlt (which CPL 3 may not execute), 14 a read of FAR, 0 a division by 0
 *	OUT	a port that is written first, before the exception; a #GP where it is closed
 *
 * The handler of vector v stands at 0x7D00 + 16 * v.  To VECTOR (0x20) goes the vector; to CODE (0x21) the error code or
 * 0; to CS (0x22) the saved CS; to STACK (0x23) the stack pointer as it was on entry; to ADDRESS (0x24) CR2.
 */
#ifndef BITS
#define BITS	64
#endif
#ifndef WIDE
#define WIDE	64
#endif
#ifndef TRAP
#define TRAP	6
#endif
#ifndef FAR
#define FAR	0x80000000
#endif

	.text
#if BITS == 64
	.code64
#elif BITS == 32
	.code32
#else
	.code16
#endif
	.globl	_start
_start:
#ifdef OUT
	mov	$0x77, %al
	mov	$OUT, %dx
	out	%al, %dx
#endif
#if TRAP == 6
	ud2
#elif TRAP == 3
	int3
#elif TRAP == 13
	hlt
#elif TRAP == 14
	mov	$FAR, %eax
#if BITS == 64
	mov	(%rax), %eax
#else
	mov	(%eax), %eax
#endif
#else
	xor	%ecx, %ecx
	div	%ecx
#endif
	jmp	.

	.org	0x100
#if WIDE == 64
	.code64
	.set	WORD, 8
#define SP	%rsp
#define DX	%rdx
#define BX	%rbx
#else
	.code32
	.set	WORD, 4
#define SP	%esp
#define DX	%edx
#define BX	%ebx
#endif
	.set	vector, 0
	.rept	32
	.balign	16
	mov	SP, BX
	.if	vector == 8 || (vector >= 10 && vector <= 14) || vector == 17
	mov	(SP), %esi
	.else
	xor	%esi, %esi
	sub	$WORD, SP
	.endif
	mov	$vector, %al
	jmp	tell
	.set	vector, vector + 1
	.endr
tell:
	out	%al, $0x20
	mov	%esi, %eax
	out	%eax, $0x21
	mov	2 * WORD(SP), %eax
	and	$0xffff, %eax
	out	%eax, $0x22
	mov	%ebx, %eax
	out	%eax, $0x23
	mov	%cr2, DX
	mov	%edx, %eax
	out	%eax, $0x24
	hlt
