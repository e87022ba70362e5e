/*
 * hello: the guest that `hvmodel boot` runs when it is given no image.
 *
 * A flat real-mode image.  It greets on the first serial port and halts with interrupts off, which is
 * a clean end.  It runs at any paragraph of the first MiB, whether entered as 0000:7C00 or 07C0:0000:
 * the text is addressed from where the code finds itself, and memory is touched only below 0x500,
 * where no loader puts an image.
 */
	.set	COM1_DATA, 0x3f8
	.set	COM1_LSR, 0x3fd
	.set	LSR_THRE, 0x20			/* transmitter holding register empty */

	.code16
	.text
	.globl	_start
_start:
	cli
	cld
	xor	%ax, %ax
	mov	%ax, %ss
	mov	$0x500, %sp
	mov	%cs, %ax
	mov	%ax, %ds
	call	1f
1:	pop	%si				/* the offset of 1b in CS, wherever that is */
	add	$(greeting - 1b), %si

next:	lodsb
	test	%al, %al
	jz	done
	mov	%al, %ah
	mov	$COM1_LSR, %dx
wait:	in	%dx, %al
	test	$LSR_THRE, %al
	jz	wait
	mov	%ah, %al
	mov	$COM1_DATA, %dx
	out	%al, %dx
	jmp	next

done:	hlt
	jmp	done				/* an NMI would end the hlt */

greeting:
	.asciz	"Hello from a real-mode guest: hvmodel runs me on KVM.\n"
