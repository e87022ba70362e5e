/* The registers at every exit, in C: KVM_RUN brings them (KVM_CAP_SYNC_REGS), the loop looks at
 * them. */
#include "vm.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

/* What is done at an exit, besides seeing that it is a write: see benchmarks/sync.py. */
enum { NOTHING = 0, TWO = 1, ALL = 2 };

static struct kvm_sync_regs kept;

/* `nr` exits; the sum of what was looked at, or -errno (as a negative number, which no sum is). */
int64_t floor_sync(struct floor_vm *v, uint64_t nr, int what)
{
	struct kvm_run *run = v->run;
	uint64_t sum = 0;

	run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	for (uint64_t i = 0; i < nr; i++) {
		while (ioctl(v->vcpu, KVM_RUN, 0) < 0)
			if (errno != EINTR)
				return -errno;
		if (run->exit_reason != KVM_EXIT_IO && run->exit_reason != KVM_EXIT_MMIO)
			return -EPROTO;
		switch (what) {
		case TWO:
			sum += run->s.regs.regs.rip ^ run->s.regs.regs.rax;
			break;
		case ALL:
			memcpy(&kept.regs, &run->s.regs.regs, sizeof(kept.regs));
			memcpy(&kept.sregs, &run->s.regs.sregs, sizeof(kept.sregs));
			sum += kept.regs.rip;
			break;
		default:
			break;
		}
	}
	return (int64_t)(sum & INT64_MAX);
}
