/*
 * What every floor stands on: a VM as plain C makes one.  RAM is one memfd, sealed against growing
 * and shrinking, mapped shared and given to KVM as one slot at 0; one vCPU, in real mode at 0x7C00.
 */
#ifndef FLOOR_VM_H
#define FLOOR_VM_H

#include <linux/kvm.h>
#include <stddef.h>
#include <stdint.h>

struct floor_vm {
	int kvm;
	int vm;
	int vcpu;
	int memfd;
	uint8_t *ram;
	uint64_t ram_size;
	struct kvm_run *run;
	size_t run_size;
};

/*
 * What is set of a new vCPU besides CS and the general registers:
 * FLOOR_CPUID: CPUID, all that KVM can give; asked for once per process, as hvmodel does.
 * FLOOR_MACHINE: what hvmodel.Machine sets too: registers come with
 * every exit, no event is pending, the vCPU is runnable.
 */
#define FLOOR_CPUID   1
#define FLOOR_MACHINE 2

/* All return 0 or -errno; floor_vm_open() leaves nothing open when it fails. */
int floor_vm_open(struct floor_vm *v, const void *image, uint64_t size, uint64_t ram_size,
		  int flags);
/* Closes as hvmodel does: kvm_run, vCPU, VM, RAM, memfd, /dev/kvm; the slot goes with its VM. */
void floor_vm_close(struct floor_vm *v);

/* For ctypes, which does not know the struct: NULL and errno when it fails. */
struct floor_vm *floor_new(const void *image, uint64_t size, uint64_t ram_size, int flags);
void floor_free(struct floor_vm *v);

#endif
