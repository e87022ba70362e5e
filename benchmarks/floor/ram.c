/*
 * Guest RAM in C: a block created and populated, and memcpy.
 *
 * A block is made by the calls that QEMU makes for memory-backend-memfd and memory-backend-ram: the
 * file, its size, its seals; addresses reserved with room to align them, the memory mapped at the
 * aligned one, the rest given back but for a guard page; advice, which the kernel need not want.
 */
#define _GNU_SOURCE
#include "vm.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define PAGE	    4096UL
#define HUGE_PAGE   (2UL << 20)
#define MAX_THREADS 64

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif

/* What a block is made of: a memfd, if nothing else is said. */
#define BLOCK_ANON    1 /* private anonymous memory */
#define BLOCK_HUGETLB 2 /* a memfd of 2 MiB pages */

/* How it is populated. */
#define FILL_TOUCH    0 /* a byte of each 4 KiB page */
#define FILL_POPULATE 1 /* MADV_POPULATE_WRITE, in as many threads as asked for */
#define FILL_WRITE    2 /* memcpy from a buffer, again and again */
#define FILL_PWRITE   3 /* the same with pwrite() to the file */

struct floor_block {
	int fd;
	uint8_t *host;
	uint64_t size;
	uint64_t guard;
};

struct floor_fill {
	int method;
	int threads;
	const void *data; /* of FILL_WRITE and FILL_PWRITE, data_size bytes of it */
	uint64_t data_size;
};

struct part {
	pthread_t thread;
	uint8_t *start;
	uint64_t size;
	int rc;
};

static int open_file(struct floor_block *b, int flags)
{
	unsigned int mfd = MFD_CLOEXEC | MFD_ALLOW_SEALING;

	if (flags & BLOCK_HUGETLB)
		mfd |= MFD_HUGETLB | MFD_HUGE_2MB;
	b->fd = memfd_create("floor.ram", mfd);
	if (b->fd < 0 || ftruncate(b->fd, (off_t)b->size) < 0 ||
	    fcntl(b->fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) < 0)
		return -errno;
	return 0;
}

static int map_block(struct floor_block *b, int flags)
{
	int kind = flags & BLOCK_ANON ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	uint64_t align = flags ? HUGE_PAGE : PAGE;
	uint64_t total = b->size + align;
	uint8_t *reserved, *host;
	uint64_t head, tail;

	reserved = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (reserved == MAP_FAILED)
		return -errno;
	head = -(uintptr_t)reserved & (align - 1);
	host = mmap(reserved + head, b->size, PROT_READ | PROT_WRITE, MAP_FIXED | kind, b->fd, 0);
	if (host == MAP_FAILED) {
		int rc = -errno;

		munmap(reserved, total);
		return rc;
	}
	b->host = host;
	if (head)
		munmap(reserved, head);
	tail = total - head - b->size;
	b->guard = tail < PAGE ? tail : PAGE;
	if (tail > b->guard)
		munmap(host + b->size + b->guard, tail - b->guard);
	if (flags & BLOCK_ANON)
		madvise(host, b->size, MADV_MERGEABLE);
	madvise(host, b->size, MADV_HUGEPAGE);
	madvise(host, b->size, MADV_DONTFORK);
	madvise(host, b->size, MADV_MERGEABLE);
	return 0;
}

static void *populate_part(void *data)
{
	struct part *part = data;

	do
		part->rc = madvise(part->start, part->size, MADV_POPULATE_WRITE) < 0 ? -errno : 0;
	while (part->rc == -EINTR);
	return NULL;
}

static int populate(struct floor_block *b, int threads)
{
	uint64_t share = b->size / (uint64_t)threads & ~(HUGE_PAGE - 1);
	struct part parts[MAX_THREADS];
	int started, rc = 0;

	if (threads == 1 || !share) {
		parts[0] = (struct part){.start = b->host, .size = b->size};
		populate_part(&parts[0]);
		return parts[0].rc;
	}
	for (started = 0; started < threads; started++) {
		struct part *part = &parts[started];

		*part = (struct part){.start = b->host + (uint64_t)started * share, .size = share};
		if (started == threads - 1)
			part->size = b->size - (uint64_t)started * share;
		rc = -pthread_create(&part->thread, NULL, populate_part, part);
		if (rc)
			break;
	}
	for (int i = 0; i < started; i++) {
		pthread_join(parts[i].thread, NULL);
		if (!rc)
			rc = parts[i].rc;
	}
	return rc;
}

static int fill(struct floor_block *b, const struct floor_fill *how)
{
	switch (how->method) {
	case FILL_TOUCH:
		for (uint64_t at = 0; at < b->size; at += PAGE)
			((volatile uint8_t *)b->host)[at] = 0;
		return 0;
	case FILL_POPULATE:
		if (how->threads < 1 || how->threads > MAX_THREADS)
			return -EINVAL;
		return populate(b, how->threads);
	case FILL_WRITE:
		for (uint64_t at = 0; at < b->size; at += how->data_size)
			memcpy(b->host + at, how->data, how->data_size);
		return 0;
	case FILL_PWRITE:
		for (uint64_t at = 0; at < b->size; at += how->data_size)
			if (pwrite(b->fd, how->data, how->data_size, (off_t)at) !=
			    (ssize_t)how->data_size)
				return -EIO;
		return 0;
	}
	return -EINVAL;
}

void floor_block_free(struct floor_block *b)
{
	if (b->host)
		munmap(b->host, b->size + b->guard);
	if (b->fd >= 0)
		close(b->fd);
	free(b);
}

/* A block of `size` bytes, populated.  NULL and errno when it fails. */
struct floor_block *floor_block_new(uint64_t size, int flags, const struct floor_fill *how)
{
	struct floor_block *b = malloc(sizeof(*b));
	int rc = 0;

	if (!b)
		return NULL;
	*b = (struct floor_block){.fd = -1, .size = size};
	if (!(flags & BLOCK_ANON))
		rc = open_file(b, flags);
	if (!rc)
		rc = map_block(b, flags);
	if (!rc)
		rc = fill(b, how);
	if (rc) {
		floor_block_free(b);
		errno = -rc;
		return NULL;
	}
	return b;
}

uint64_t floor_block_host(const struct floor_block *b)
{
	return (uintptr_t)b->host;
}

/*
 * Have the host give this much memory and take it back at once: what it has free now, it can give
 * without asking a host of its own.  0 or -errno.
 */
int floor_warm(uint64_t size)
{
	static const struct floor_fill populated = {.method = FILL_POPULATE, .threads = 1};
	struct floor_block *b = floor_block_new(size, BLOCK_ANON, &populated);

	if (!b)
		return -errno;
	floor_block_free(b);
	return 0;
}

/* `nr` copies.  The compiler must not see that they are all the same. */
void floor_copy(void *to, const void *from, uint64_t size, uint64_t nr)
{
	while (nr--) {
		memcpy(to, from, size);
		__asm__ volatile("" : : "r"(to), "r"(from) : "memory");
	}
}

/* `nr` copies into new memory each, as whoever wants to keep them makes them.  0 or -errno. */
int floor_read(const void *from, uint64_t size, uint64_t nr)
{
	while (nr--) {
		void *copy = malloc(size);

		if (!copy)
			return -errno;
		memcpy(copy, from, size);
		__asm__ volatile("" : : "r"(copy) : "memory");
		free(copy);
	}
	return 0;
}

/* Mark every page of a buffer with what no page of an earlier mark has. */
void floor_mark(void *start, uint64_t size, uint64_t mark)
{
	for (uint64_t at = 0; at < size; at += PAGE)
		*(uint64_t *)((uint8_t *)start + at) = mark ^ at;
}

/* Pages that do not have the mark. */
uint64_t floor_unmarked(const void *start, uint64_t size, uint64_t mark)
{
	uint64_t missing = 0;

	for (uint64_t at = 0; at < size; at += PAGE)
		missing += *(const uint64_t *)((const uint8_t *)start + at) != (mark ^ at);
	return missing;
}
