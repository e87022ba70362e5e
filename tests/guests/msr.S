/*
 * msr: reads MSR and writes EDX:EAX to REPORT (EAX first), or with WRITE set writes VALUE to it; then hlt.
 * A #GP writes the byte 13 to REPORT and ends in hlt as well.  Real mode.
 *
 *	MSR, one that KVM does not know (0x12345)  WRITE  VALUE, 32 bits (0x44332211)  REPORT (0x10)
 */
#ifndef MSR
#define MSR	0x12345
#endif
#ifndef VALUE
#define VALUE	0x44332211
#endif
#ifndef REPORT
#define REPORT	0x10
#endif
#include "modes.h"

	.text
	.globl	_start
_start:
	real_mode_setup
	movl	$gp, 13 * 4
	mov	$MSR, %ecx
#ifdef WRITE
	mov	$VALUE, %eax
	xor	%edx, %edx
	wrmsr
#else
	rdmsr
	out	%eax, $REPORT
	mov	%edx, %eax
	out	%eax, $REPORT
#endif
	hlt
gp:	mov	$13, %al
	out	%al, $REPORT
	hlt
