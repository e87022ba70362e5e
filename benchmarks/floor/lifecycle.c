/* A whole life in C: open, VM, slot, vCPU, run to the first exit, close. */
#include "vm.h"

#include <errno.h>
#include <sys/ioctl.h>

/* The reason of the first exit, or -errno. */
int floor_lifecycle(const void *image, uint64_t size, uint64_t ram_size, int flags)
{
	struct floor_vm v;
	int rc = floor_vm_open(&v, image, size, ram_size, flags);

	if (rc)
		return rc;
	do
		rc = ioctl(v.vcpu, KVM_RUN, 0) < 0 ? -errno : (int)v.run->exit_reason;
	while (rc == -EINTR); /* a signal that was meant for another vCPU of this thread */
	floor_vm_close(&v);
	return rc;
}
