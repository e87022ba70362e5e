// SPDX-License-Identifier: MIT
/* Linux without KVM; see host.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/vfs.h>
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
_Static_assert(HV_MFD_HUGETLB == MFD_HUGETLB, "MFD_HUGETLB");
#ifdef MFD_NOEXEC_SEAL
_Static_assert(HV_MFD_NOEXEC_SEAL == MFD_NOEXEC_SEAL, "MFD_NOEXEC_SEAL");
#endif
#ifdef MFD_EXEC
_Static_assert(HV_MFD_EXEC == MFD_EXEC, "MFD_EXEC");
#endif
#ifdef MFD_HUGE_SHIFT
_Static_assert(HV_MFD_HUGE_SHIFT == MFD_HUGE_SHIFT, "MFD_HUGE_SHIFT");
#endif
#ifdef MAP_SHARED_VALIDATE
_Static_assert(HV_MAP_SHARED_VALIDATE == MAP_SHARED_VALIDATE, "MAP_SHARED_VALIDATE");
#endif
_Static_assert(HV_MAP_FIXED == MAP_FIXED, "MAP_FIXED");
_Static_assert(HV_MAP_NORESERVE == MAP_NORESERVE, "MAP_NORESERVE");
#ifdef MAP_SYNC
_Static_assert(HV_MAP_SYNC == MAP_SYNC, "MAP_SYNC");
#endif
_Static_assert(HV_MADV_WILLNEED == MADV_WILLNEED, "MADV_WILLNEED");
_Static_assert(HV_MADV_DONTNEED == MADV_DONTNEED, "MADV_DONTNEED");
_Static_assert(HV_MADV_REMOVE == MADV_REMOVE, "MADV_REMOVE");
_Static_assert(HV_MADV_DONTFORK == MADV_DONTFORK, "MADV_DONTFORK");
_Static_assert(HV_MADV_DOFORK == MADV_DOFORK, "MADV_DOFORK");
_Static_assert(HV_MADV_MERGEABLE == MADV_MERGEABLE, "MADV_MERGEABLE");
_Static_assert(HV_MADV_UNMERGEABLE == MADV_UNMERGEABLE, "MADV_UNMERGEABLE");
_Static_assert(HV_MADV_HUGEPAGE == MADV_HUGEPAGE, "MADV_HUGEPAGE");
_Static_assert(HV_MADV_NOHUGEPAGE == MADV_NOHUGEPAGE, "MADV_NOHUGEPAGE");
_Static_assert(HV_MADV_DONTDUMP == MADV_DONTDUMP, "MADV_DONTDUMP");
_Static_assert(HV_MADV_DODUMP == MADV_DODUMP, "MADV_DODUMP");
#ifdef MADV_COLD
_Static_assert(HV_MADV_COLD == MADV_COLD, "MADV_COLD");
#endif
#ifdef MADV_PAGEOUT
_Static_assert(HV_MADV_PAGEOUT == MADV_PAGEOUT, "MADV_PAGEOUT");
#endif
#ifdef MADV_POPULATE_READ
_Static_assert(HV_MADV_POPULATE_READ == MADV_POPULATE_READ, "MADV_POPULATE_READ");
#endif
#ifdef MADV_POPULATE_WRITE
_Static_assert(HV_MADV_POPULATE_WRITE == MADV_POPULATE_WRITE, "MADV_POPULATE_WRITE");
#endif
#ifdef MADV_COLLAPSE
_Static_assert(HV_MADV_COLLAPSE == MADV_COLLAPSE, "MADV_COLLAPSE");
#endif
#ifdef MADV_GUARD_INSTALL
_Static_assert(HV_MADV_GUARD_INSTALL == MADV_GUARD_INSTALL, "MADV_GUARD_INSTALL");
#endif
#ifdef MADV_GUARD_REMOVE
_Static_assert(HV_MADV_GUARD_REMOVE == MADV_GUARD_REMOVE, "MADV_GUARD_REMOVE");
#endif
_Static_assert(HV_FALLOC_FL_KEEP_SIZE == FALLOC_FL_KEEP_SIZE, "FALLOC_FL_KEEP_SIZE");
_Static_assert(HV_FALLOC_FL_PUNCH_HOLE == FALLOC_FL_PUNCH_HOLE, "FALLOC_FL_PUNCH_HOLE");

#define PAGE		     4096UL /* of the only architecture there is */
#define HUGETLBFS	     0x958458f6
#define MAP_FIXED_OR_NOTHING 0x100000 /* MAP_FIXED_NOREPLACE */

/* An entry of /proc/self/pagemap. */
#define PM_EXCLUSIVE \
	(1UL << 56) /* nobody else has it: not the page of zeros, nor one from before a fork */
#define PM_FILE	   (1UL << 61) /* of a file's page, or of anonymous memory that is shared */
#define PM_PRESENT (1UL << 63)

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

int hv_fallocate(int fd, int mode, int64_t offset, int64_t length)
{
	return answer(fallocate(fd, mode, offset, length));
}

int64_t hv_fd_page_size(int fd)
{
	struct statfs fs;

	while (fstatfs(fd, &fs) < 0) {
		if (errno != EINTR)
			return -errno;
	}
	return fs.f_type == HUGETLBFS ? (int64_t)fs.f_bsize : (int64_t)PAGE;
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

int hv_madvise(uint64_t address, uint64_t length, int advice)
{
	return answer(madvise((void *)address, length, advice));
}

int hv_msync(uint64_t address, uint64_t length)
{
	return answer(msync((void *)address, length, MS_SYNC));
}

/* The mapping itself, with MAP_SYNC if it can be had. */
static int64_t activate(uint64_t address, uint64_t length, int prot, int flags, int fd,
			int64_t offset, int *unsynced)
{
	int64_t p = hv_mmap(address, length, prot, flags, fd, offset);

	*unsynced = 0;
	if (p >= 0 || !(flags & HV_MAP_SYNC))
		return p;
	*unsynced = (int)-p;
	flags &= ~(HV_MAP_SYNC | HV_MAP_SHARED_VALIDATE);
	return hv_mmap(address, length, prot, flags | MAP_SHARED, fd, offset);
}

int64_t hv_ram_mmap(uint64_t length, uint64_t align, int prot, int flags, int fd, int64_t offset,
		    int *unsynced)
{
	int64_t reserved, address, end;
	uint64_t skip;

	if (!align)
		return activate(0, length, prot, flags, fd, offset, unsynced);
	reserved = hv_mmap(0, length + align, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (reserved < 0)
		return reserved;
	skip = -(uint64_t)reserved & (align - 1);
	address = activate((uint64_t)reserved + skip, length, prot, flags | MAP_FIXED, fd, offset,
			   unsynced);
	if (address < 0) {
		hv_munmap((uint64_t)reserved, length + align);
		return address;
	}
	if (skip)
		hv_munmap((uint64_t)reserved, skip);
	end = address + (int64_t)(length + PAGE);
	if (skip + PAGE < align)
		hv_munmap((uint64_t)end, align - skip - PAGE);
	return address;
}

int hv_mmap_stand_in(uint64_t address, uint64_t length)
{
	int64_t p =
		hv_mmap(address, length, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_OR_NOTHING, -1, 0);

	return p < 0 ? (int)p : 0;
}

static int64_t nr_not_in_core(uint64_t address, uint64_t length)
{
	unsigned char in_core[16384];
	int64_t missing = 0;

	for (uint64_t done = 0; done < length;) {
		uint64_t left = length - done, most = sizeof(in_core) * PAGE;
		uint64_t part = left < most ? left : most;

		if (mincore((void *)(address + done), part, in_core) < 0)
			return -errno;
		for (uint64_t i = 0; i < part / PAGE; i++)
			missing += !(in_core[i] & 1);
		done += part;
	}
	return missing;
}

static int64_t nr_not_copied(int pagemap, uint64_t address, uint64_t length)
{
	uint64_t entries[2048], end = (address + length) / PAGE;
	int64_t missing = 0;

	for (uint64_t page = address / PAGE; page < end;) {
		uint64_t left = end - page, most = sizeof(entries) / sizeof(*entries);
		ssize_t n =
			pread(pagemap, entries, (left < most ? left : most) * 8, (off_t)(page * 8));

		if (n < 8)
			return n < 0 ? -errno : -EIO;
		n /= 8;
		for (ssize_t i = 0; i < n; i++)
			missing += (entries[i] & (PM_PRESENT | PM_EXCLUSIVE | PM_FILE)) !=
				   (PM_PRESENT | PM_EXCLUSIVE);
		page += (uint64_t)n;
	}
	return missing;
}

int64_t hv_nr_missing(uint64_t address, uint64_t length, int copies)
{
	int64_t missing;
	int pagemap;

	if (!copies)
		return nr_not_in_core(address, length);
	pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pagemap < 0)
		return -errno;
	missing = nr_not_copied(pagemap, address, length);
	close(pagemap);
	return missing;
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
