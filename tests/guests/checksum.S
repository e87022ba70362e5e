/*
 * checksum: fills the first LIMIT bytes of memory and adds them up again; 16-bit code that reaches all of the
 * first MiB through segment arithmetic.  Real mode, entered at 0x7C00.
 *
 * Every dword gets the number of the paragraph it lies in, which is the segment that begins there.  Only the page
 * 0x7000..0x7fff is left alone: it holds this code and its stack.  The sum modulo 2^32 goes to REPORT, then hlt:
 *	4 * sum(p for p in range(LIMIT >> 4) if not 0x700 <= p < 0x800) % 2**32
 *
 * Filling goes by 4 KiB in segments 0x100 apart, with small offsets; adding goes by 64 KiB in segments 0x1000
 * apart, with offsets up to 0xffff.  So each byte is written under one seg:offset and read under another.
 *
 *	LIMIT, a multiple of 64 KiB up to 1 MiB (0x100000)  REPORT (0x10)
 */
#ifndef LIMIT
#define LIMIT	0x100000
#endif
#ifndef REPORT
#define REPORT	0x10
#endif
	.code16
	.text
	.globl	_start
_start:
	cli
	cld
	xor	%ax, %ax
	mov	%ax, %ss
	mov	$0x8000, %sp

	xor	%bx, %bx			/* segment of the page to fill */
fill:	cmp	$0x700, %bx
	je	2f
	mov	%bx, %es
	xor	%di, %di
	movzwl	%bx, %eax
	mov	$0x1000 / 16, %cx
1:	stosl
	stosl
	stosl
	stosl
	inc	%eax
	loop	1b
2:	add	$0x100, %bx
	cmp	$(LIMIT >> 4) & 0xffff, %bx	/* 1 MiB is segment 0x10000: wraps to 0 */
	jne	fill

	xor	%edx, %edx			/* the sum */
	xor	%bx, %bx
	mov	%bx, %ds
	xor	%si, %si
	mov	$0x7000 / 64, %cx
	call	add
	mov	$0x8000, %si
	mov	$0x8000 / 64, %cx
	call	add
3:	add	$0x1000, %bx
	cmp	$(LIMIT >> 4) & 0xffff, %bx
	je	done
	mov	%bx, %ds
	xor	%si, %si
	mov	$0x10000 / 64, %cx
	call	add
	jmp	3b

done:	mov	%edx, %eax
	mov	$REPORT, %dx
	out	%eax, %dx
	hlt

/* edx += the 64 * cx bytes at ds:si, by dwords */
add:
	.set	offset, 0
	.rept	16
	add	offset(%si), %edx
	.set	offset, offset + 4
	.endr
	add	$64, %si
	loop	add
	ret
