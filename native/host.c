// SPDX-License-Identifier: MIT
/* Linux without KVM; see host.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "host.h"

_Static_assert(HV_MFD_CLOEXEC == MFD_CLOEXEC, "MFD_CLOEXEC");
_Static_assert(HV_MFD_ALLOW_SEALING == MFD_ALLOW_SEALING, "MFD_ALLOW_SEALING");
_Static_assert(HV_F_SEAL_SEAL == F_SEAL_SEAL, "F_SEAL_SEAL");
_Static_assert(HV_F_SEAL_SHRINK == F_SEAL_SHRINK, "F_SEAL_SHRINK");
_Static_assert(HV_F_SEAL_GROW == F_SEAL_GROW, "F_SEAL_GROW");
_Static_assert(HV_F_SEAL_WRITE == F_SEAL_WRITE, "F_SEAL_WRITE");
#ifdef F_SEAL_FUTURE_WRITE
_Static_assert(HV_F_SEAL_FUTURE_WRITE == F_SEAL_FUTURE_WRITE, "F_SEAL_FUTURE_WRITE");
#endif
#ifdef F_SEAL_EXEC
_Static_assert(HV_F_SEAL_EXEC == F_SEAL_EXEC, "F_SEAL_EXEC");
#endif
_Static_assert(HV_PROT_NONE == PROT_NONE, "PROT_NONE");
_Static_assert(HV_PROT_READ == PROT_READ, "PROT_READ");
_Static_assert(HV_PROT_WRITE == PROT_WRITE, "PROT_WRITE");
_Static_assert(HV_PROT_EXEC == PROT_EXEC, "PROT_EXEC");
_Static_assert(HV_MAP_SHARED == MAP_SHARED, "MAP_SHARED");
_Static_assert(HV_MAP_PRIVATE == MAP_PRIVATE, "MAP_PRIVATE");
_Static_assert(HV_MAP_ANONYMOUS == MAP_ANONYMOUS, "MAP_ANONYMOUS");

static int answer(int result)
{
	return result < 0 ? -errno : result;
}

int hv_memfd_create(const char *name, uint32_t flags)
{
	return answer(memfd_create(name, flags));
}

int hv_ftruncate(int fd, int64_t size)
{
	return answer(ftruncate(fd, size));
}

int hv_add_seals(int fd, int seals)
{
	return answer(fcntl(fd, F_ADD_SEALS, seals));
}

int hv_get_seals(int fd)
{
	return answer(fcntl(fd, F_GET_SEALS));
}

int64_t hv_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd, int64_t offset)
{
	void *p = mmap((void *)address, length, prot, flags, fd, offset);

	return p == MAP_FAILED ? -errno : (int64_t)p;
}

int hv_munmap(uint64_t address, uint64_t length)
{
	return answer(munmap((void *)address, length));
}

int hv_mprotect(uint64_t address, uint64_t length, int prot)
{
	return answer(mprotect((void *)address, length, prot));
}

/* One call moves 2 GiB at most and stops at the first page it cannot reach, so go on until nothing
 * moves. */
static int64_t vm_copy(uint64_t address, void *data, uint64_t size, int write)
{
	pid_t self = getpid();
	uint64_t done = 0;

	while (done < size) {
		struct iovec local = {(char *)data + done, size - done};
		struct iovec memory = {(void *)(address + done), size - done};
		ssize_t n = write ? process_vm_writev(self, &local, 1, &memory, 1, 0)
				  : process_vm_readv(self, &local, 1, &memory, 1, 0);

		if (n <= 0)
			return done ? (int64_t)done : (n < 0 ? -errno : -EFAULT);
		done += (uint64_t)n;
	}
	return (int64_t)done;
}

int64_t hv_vm_read(uint64_t address, void *data, uint64_t size)
{
	return vm_copy(address, data, size, 0);
}

int64_t hv_vm_write(uint64_t address, const void *data, uint64_t size)
{
	return vm_copy(address, (void *)(uintptr_t)data, size, 1);
}
