// SPDX-License-Identifier: MIT
/* Looking at memory; see look.h. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/fs.h>
#include <linux/kernel-page-flags.h>
#include <linux/mempolicy.h>

#include "look.h"

#define PAGE	4096UL
#define BIT(nr) (1ULL << (nr))

#define HV_PAGEMAP_SCAN _IOWR('f', 16, struct hv_pm_scan_arg)

_Static_assert(HV_PAGEMAP_SCAN == 0xc0606610, "PAGEMAP_SCAN");
#ifdef PAGEMAP_SCAN
_Static_assert(HV_PAGEMAP_SCAN == PAGEMAP_SCAN, "PAGEMAP_SCAN");
_Static_assert(sizeof(struct hv_page_region) == sizeof(struct page_region), "page_region");
_Static_assert(HV_PAGE_IS_WPALLOWED == PAGE_IS_WPALLOWED, "PAGE_IS_WPALLOWED");
_Static_assert(HV_PAGE_IS_WRITTEN == PAGE_IS_WRITTEN, "PAGE_IS_WRITTEN");
_Static_assert(HV_PAGE_IS_FILE == PAGE_IS_FILE, "PAGE_IS_FILE");
_Static_assert(HV_PAGE_IS_PRESENT == PAGE_IS_PRESENT, "PAGE_IS_PRESENT");
_Static_assert(HV_PAGE_IS_SWAPPED == PAGE_IS_SWAPPED, "PAGE_IS_SWAPPED");
_Static_assert(HV_PAGE_IS_PFNZERO == PAGE_IS_PFNZERO, "PAGE_IS_PFNZERO");
_Static_assert(HV_PAGE_IS_HUGE == PAGE_IS_HUGE, "PAGE_IS_HUGE");
_Static_assert(HV_PM_SCAN_WP_MATCHING == PM_SCAN_WP_MATCHING, "PM_SCAN_WP_MATCHING");
_Static_assert(HV_PM_SCAN_CHECK_WPASYNC == PM_SCAN_CHECK_WPASYNC, "PM_SCAN_CHECK_WPASYNC");
#endif

_Static_assert(HV_KPF_LOCKED == KPF_LOCKED, "KPF_LOCKED");
_Static_assert(HV_KPF_ERROR == KPF_ERROR, "KPF_ERROR");
_Static_assert(HV_KPF_REFERENCED == KPF_REFERENCED, "KPF_REFERENCED");
_Static_assert(HV_KPF_UPTODATE == KPF_UPTODATE, "KPF_UPTODATE");
_Static_assert(HV_KPF_DIRTY == KPF_DIRTY, "KPF_DIRTY");
_Static_assert(HV_KPF_LRU == KPF_LRU, "KPF_LRU");
_Static_assert(HV_KPF_ACTIVE == KPF_ACTIVE, "KPF_ACTIVE");
_Static_assert(HV_KPF_SLAB == KPF_SLAB, "KPF_SLAB");
_Static_assert(HV_KPF_WRITEBACK == KPF_WRITEBACK, "KPF_WRITEBACK");
_Static_assert(HV_KPF_RECLAIM == KPF_RECLAIM, "KPF_RECLAIM");
_Static_assert(HV_KPF_BUDDY == KPF_BUDDY, "KPF_BUDDY");
_Static_assert(HV_KPF_MMAP == KPF_MMAP, "KPF_MMAP");
_Static_assert(HV_KPF_ANON == KPF_ANON, "KPF_ANON");
_Static_assert(HV_KPF_SWAPCACHE == KPF_SWAPCACHE, "KPF_SWAPCACHE");
_Static_assert(HV_KPF_SWAPBACKED == KPF_SWAPBACKED, "KPF_SWAPBACKED");
_Static_assert(HV_KPF_COMPOUND_HEAD == KPF_COMPOUND_HEAD, "KPF_COMPOUND_HEAD");
_Static_assert(HV_KPF_COMPOUND_TAIL == KPF_COMPOUND_TAIL, "KPF_COMPOUND_TAIL");
_Static_assert(HV_KPF_HUGE == KPF_HUGE, "KPF_HUGE");
_Static_assert(HV_KPF_UNEVICTABLE == KPF_UNEVICTABLE, "KPF_UNEVICTABLE");
_Static_assert(HV_KPF_HWPOISON == KPF_HWPOISON, "KPF_HWPOISON");
_Static_assert(HV_KPF_NOPAGE == KPF_NOPAGE, "KPF_NOPAGE");
_Static_assert(HV_KPF_KSM == KPF_KSM, "KPF_KSM");
_Static_assert(HV_KPF_THP == KPF_THP, "KPF_THP");
_Static_assert(HV_KPF_OFFLINE == KPF_OFFLINE, "KPF_OFFLINE");
_Static_assert(HV_KPF_ZERO_PAGE == KPF_ZERO_PAGE, "KPF_ZERO_PAGE");
_Static_assert(HV_KPF_IDLE == KPF_IDLE, "KPF_IDLE");
_Static_assert(HV_KPF_PGTABLE == KPF_PGTABLE, "KPF_PGTABLE");

_Static_assert(HV_MPOL_DEFAULT == MPOL_DEFAULT, "MPOL_DEFAULT");
_Static_assert(HV_MPOL_PREFERRED == MPOL_PREFERRED, "MPOL_PREFERRED");
_Static_assert(HV_MPOL_BIND == MPOL_BIND, "MPOL_BIND");
_Static_assert(HV_MPOL_INTERLEAVE == MPOL_INTERLEAVE, "MPOL_INTERLEAVE");
_Static_assert(HV_MPOL_LOCAL == MPOL_LOCAL, "MPOL_LOCAL");
_Static_assert(HV_MPOL_F_NODE == MPOL_F_NODE, "MPOL_F_NODE");
_Static_assert(HV_MPOL_F_ADDR == MPOL_F_ADDR, "MPOL_F_ADDR");
_Static_assert(HV_MPOL_F_MEMS == MPOL_F_MEMS_ALLOWED, "MPOL_F_MEMS_ALLOWED");
_Static_assert(HV_MPOL_MF_STRICT == MPOL_MF_STRICT, "MPOL_MF_STRICT");
_Static_assert(HV_MPOL_MF_MOVE == MPOL_MF_MOVE, "MPOL_MF_MOVE");

static int64_t answer(int64_t result)
{
	return result < 0 ? -errno : result;
}

int hv_pagemap_read(int fd, uint64_t address, uint64_t size, void *words)
{
	uint64_t offset = address / PAGE * 8, left = size / PAGE * 8;
	char *to = words;

	while (left) {
		ssize_t n = pread(fd, to, left, (off_t)offset);

		if (n < 0) {
			if (errno == EINTR)
				continue;
			return -errno;
		}
		if (n == 0)
			return -ESRCH;
		to += n;
		offset += (uint64_t)n;
		left -= (uint64_t)n;
	}
	return 0;
}

/* A range is read so many pages at a time: what one page-table page and one buffer on the stack
 * have room for. */
#define CHUNK 512

int hv_pagemap_count(int fd, uint64_t address, uint64_t size, struct hv_page_counts *counts)
{
	uint64_t words[CHUNK];

	memset(counts, 0, sizeof(*counts));
	while (size) {
		uint64_t step = size < CHUNK * PAGE ? size : CHUNK * PAGE;
		int error = hv_pagemap_read(fd, address, step, words);

		if (error)
			return error;
		for (uint64_t i = 0; i < step / PAGE; i++) {
			uint64_t word = words[i];
			int swap = word >> HV_PM_SWAP & 1;
			int area = (word & (BIT(HV_PM_SWAP_TYPE_BITS) - 1)) < HV_PM_SWAP_AREAS;

			counts->present += word >> HV_PM_PRESENT & 1;
			counts->swapped += swap && area;
			counts->marked += swap && !area;
			counts->file += word >> HV_PM_FILE & 1;
			counts->exclusive += word >> HV_PM_MMAP_EXCLUSIVE & 1;
			counts->soft_dirty += word >> HV_PM_SOFT_DIRTY & 1;
			counts->uffd_wp += word >> HV_PM_UFFD_WP & 1;
			counts->guard += word >> HV_PM_GUARD_REGION & 1;
		}
		address += step;
		size -= step;
	}
	return 0;
}

int hv_pagemap_scan(int fd, struct hv_pm_scan_arg *arg)
{
	return (int)answer(ioctl(fd, HV_PAGEMAP_SCAN, arg));
}

int64_t hv_pagemap_pss(int fd, int count_fd, uint64_t address, uint64_t size)
{
	const uint64_t frames = BIT(HV_PM_PFRAME_BITS) - 1;
	uint64_t words[CHUNK], counts[CHUNK];
	uint64_t pss = 0;

	while (size) {
		uint64_t step = size < CHUNK * PAGE ? size : CHUNK * PAGE;
		uint64_t nr = step / PAGE;
		int error = hv_pagemap_read(fd, address, step, words);

		if (error)
			return error;
		for (uint64_t i = 0, run; i < nr; i += run) {
			uint64_t pfn = words[i] & frames;
			ssize_t got;

			run = 1;
			if (!(words[i] >> HV_PM_PRESENT & 1))
				continue;
			if (!pfn)
				return -EPERM;
			/* Neighbours in memory are asked about together. */
			while (i + run < nr && words[i + run] >> HV_PM_PRESENT & 1 &&
			       (words[i + run] & frames) == pfn + run)
				run++;
			got = pread(count_fd, counts, run * 8, (off_t)(pfn * 8));
			if (got < 0)
				return -errno;
			for (uint64_t k = 0; k < (uint64_t)got / 8; k++)
				/* 0: the zero page and its like, which belong to nobody. */
				pss += counts[k] ? (PAGE << 12) / counts[k] : 0;
		}
		address += step;
		size -= step;
	}
	return (int64_t)pss;
}

int hv_mincore(uint64_t address, uint64_t size, void *vec)
{
	return (int)answer(mincore((void *)address, size, vec));
}

int hv_mbind(uint64_t address, uint64_t size, int mode, const uint64_t *nodes, uint64_t maxnode,
	     uint32_t flags)
{
	return (int)answer(syscall(SYS_mbind, address, size, mode, nodes, maxnode, flags));
}

int hv_get_mempolicy(int *mode, uint64_t *nodes, uint64_t maxnode, uint64_t address, uint32_t flags)
{
	return (int)answer(syscall(SYS_get_mempolicy, mode, nodes, maxnode, address, flags));
}

/* The system call, not glibc's brk(): it answers with the break as it is now, never with an error.
 */
static uint64_t raw_brk(uint64_t address)
{
	return (uint64_t)syscall(SYS_brk, address);
}

uint64_t hv_brk_current(void)
{
	return raw_brk(0);
}

static uint32_t is_mapped(uint64_t page)
{
	unsigned char resident;

	return mincore((void *)page, PAGE, &resident) == 0;
}

int hv_brk_child(const int64_t *increments, uint32_t nr, struct hv_brk_step *steps)
{
	int ends[2], status;
	uint64_t got = 0;
	pid_t child;

	if (pipe2(ends, O_CLOEXEC) < 0)
		return -errno;
	child = fork();
	if (child < 0) {
		int error = errno;

		close(ends[0]);
		close(ends[1]);
		return -error;
	}
	if (child == 0) {
		/* Nothing but system calls: another thread of the parent may have held any lock. */
		for (uint32_t i = 0; i < nr; i++) {
			struct hv_brk_step step;

			step.before = raw_brk(0);
			step.asked = step.before + (uint64_t)increments[i];
			step.after = raw_brk(step.asked);
			step.below = is_mapped((step.after - 1) & -PAGE);
			step.above = is_mapped((step.after + PAGE - 1) & -PAGE);
			if (write(ends[1], &step, sizeof(step)) != sizeof(step))
				break;
		}
		_exit(0);
	}
	close(ends[1]);
	while (got < nr * sizeof(*steps)) {
		ssize_t n = read(ends[0], (char *)steps + got, nr * sizeof(*steps) - got);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		got += (uint64_t)n;
	}
	close(ends[0]);
	/* ECHILD: somebody has asked that children be reaped by themselves. */
	while (waitpid(child, &status, 0) < 0 && errno == EINTR)
		;
	return (int)(got / sizeof(*steps));
}
