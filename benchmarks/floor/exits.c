/* The exit loop of a VMM in C: run, see what the exit is, take the byte that was written. */
#include "vm.h"

#include <errno.h>
#include <sys/ioctl.h>

#define PORT	 0x10
#define MMIO_GPA 0xd0000000

/* The sum of the bytes that the guest wrote in its next `nr` exits, or -errno. */
int64_t floor_exits(struct floor_vm *v, uint64_t nr)
{
	struct kvm_run *run = v->run;
	int64_t sum = 0;

	for (uint64_t i = 0; i < nr; i++) {
		while (ioctl(v->vcpu, KVM_RUN, 0) < 0)
			if (errno !=
			    EINTR) /* a signal that was meant for another vCPU of this thread */
				return -errno;
		switch (run->exit_reason) {
		case KVM_EXIT_IO:
			if (run->io.direction != KVM_EXIT_IO_OUT || run->io.port != PORT)
				return -EPROTO;
			sum += *((uint8_t *)run + run->io.data_offset);
			break;
		case KVM_EXIT_MMIO:
			if (!run->mmio.is_write || run->mmio.phys_addr != MMIO_GPA)
				return -EPROTO;
			sum += run->mmio.data[0];
			break;
		default:
			return -EPROTO;
		}
	}
	return sum;
}
