// SPDX-License-Identifier: MIT
/*
 * userfaultfd(2); see uffd.h.
 *
 *	faulting thread -> kernel -> fd -> our thread -> answered here, or
 *						      -> queue -> hv_uffd_next()
 *
 * The lock guards the queue, the ranges and who serves; no ioctl is issued under it.  Who uses a
 * descriptor counts in `users`, so that hv_uffd_close() closes it when the last of them is out.
 *
 * Source: fs/userfaultfd.c, mm/userfaultfd.c, include/uapi/linux/userfaultfd.h@v6.18.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if __has_include(<linux/userfaultfd.h>)
#include <linux/userfaultfd.h>
#endif

#include "uffd.h"

#define PAGE 4096ul

/* The kernel's interface, in full up to Linux 6.18; below, what the system's header knows of it is
 * compared with this. */
#define API 0xaa

struct api {
	uint64_t api;
	uint64_t features;
	uint64_t ioctls;
};

struct range {
	uint64_t start;
	uint64_t len;
};

struct registration {
	struct range range;
	uint64_t mode;
	uint64_t ioctls;
};

/* UFFDIO_COPY and, with another flag, UFFDIO_MOVE. */
struct copy {
	uint64_t dst;
	uint64_t src;
	uint64_t len;
	uint64_t mode;
	int64_t done;
};

/* UFFDIO_ZEROPAGE, UFFDIO_CONTINUE, UFFDIO_POISON. */
struct fill {
	struct range range;
	uint64_t mode;
	int64_t done;
};

struct protection {
	struct range range;
	uint64_t mode;
};

struct message {
	uint8_t event;
	uint8_t reserved[7];
	uint64_t flags;
	uint64_t address;
	uint32_t thread;
	uint32_t more;
};

#define IOC_NEW		 _IO(API, 0x00)
#define IOC_API		 _IOWR(API, 0x3f, struct api)
#define IOC_REGISTER	 _IOWR(API, 0x00, struct registration)
#define IOC_UNREGISTER	 _IOR(API, 0x01, struct range)
#define IOC_WAKE	 _IOR(API, 0x02, struct range)
#define IOC_COPY	 _IOWR(API, 0x03, struct copy)
#define IOC_ZEROPAGE	 _IOWR(API, 0x04, struct fill)
#define IOC_MOVE	 _IOWR(API, 0x05, struct copy)
#define IOC_WRITEPROTECT _IOWR(API, 0x06, struct protection)
#define IOC_CONTINUE	 _IOWR(API, 0x07, struct fill)
#define IOC_POISON	 _IOWR(API, 0x08, struct fill)
#define EVENT_PAGEFAULT	 0x12

/* Since Linux 6.13, for shared memory since 6.15: access is SIGSEGV, and to the kernel EFAULT. */
#define GUARD_INSTALL 102
#ifdef MADV_GUARD_INSTALL
_Static_assert(GUARD_INSTALL == MADV_GUARD_INSTALL, "MADV_GUARD_INSTALL");
#endif

_Static_assert(sizeof(struct message) == 32, "struct uffd_msg");
#ifdef UFFD_API
_Static_assert(API == UFFD_API, "UFFD_API");
_Static_assert(IOC_API == UFFDIO_API, "UFFDIO_API");
_Static_assert(IOC_REGISTER == UFFDIO_REGISTER, "UFFDIO_REGISTER");
_Static_assert(IOC_UNREGISTER == UFFDIO_UNREGISTER, "UFFDIO_UNREGISTER");
_Static_assert(IOC_WAKE == UFFDIO_WAKE, "UFFDIO_WAKE");
_Static_assert(IOC_COPY == UFFDIO_COPY, "UFFDIO_COPY");
_Static_assert(IOC_ZEROPAGE == UFFDIO_ZEROPAGE, "UFFDIO_ZEROPAGE");
_Static_assert(offsetof(struct message, flags) == offsetof(struct uffd_msg, arg.pagefault.flags),
	       "uffd_msg.arg.pagefault.flags");
_Static_assert(offsetof(struct message, address) ==
		       offsetof(struct uffd_msg, arg.pagefault.address),
	       "uffd_msg.arg.pagefault.address");
_Static_assert(offsetof(struct message, thread) ==
		       offsetof(struct uffd_msg, arg.pagefault.feat.ptid),
	       "uffd_msg.arg.pagefault.feat.ptid");
_Static_assert(HV_UFFD_MISSING == UFFDIO_REGISTER_MODE_MISSING, "UFFDIO_REGISTER_MODE_MISSING");
_Static_assert(HV_UFFD_WP == UFFDIO_REGISTER_MODE_WP, "UFFDIO_REGISTER_MODE_WP");
_Static_assert(HV_UFFD_FAULT_WRITE == UFFD_PAGEFAULT_FLAG_WRITE, "UFFD_PAGEFAULT_FLAG_WRITE");
_Static_assert(HV_UFFD_FAULT_WP == UFFD_PAGEFAULT_FLAG_WP, "UFFD_PAGEFAULT_FLAG_WP");
#endif
#ifdef USERFAULTFD_IOC_NEW
_Static_assert(IOC_NEW == USERFAULTFD_IOC_NEW, "USERFAULTFD_IOC_NEW");
#endif
#ifdef UFFDIO_MOVE
_Static_assert(IOC_MOVE == UFFDIO_MOVE, "UFFDIO_MOVE");
#endif
#ifdef UFFDIO_WRITEPROTECT
_Static_assert(IOC_WRITEPROTECT == UFFDIO_WRITEPROTECT, "UFFDIO_WRITEPROTECT");
#endif
#ifdef UFFDIO_CONTINUE
_Static_assert(IOC_CONTINUE == UFFDIO_CONTINUE, "UFFDIO_CONTINUE");
_Static_assert(HV_UFFD_MINOR == UFFDIO_REGISTER_MODE_MINOR, "UFFDIO_REGISTER_MODE_MINOR");
_Static_assert(HV_UFFD_FAULT_MINOR == UFFD_PAGEFAULT_FLAG_MINOR, "UFFD_PAGEFAULT_FLAG_MINOR");
#endif
#ifdef UFFDIO_POISON
_Static_assert(IOC_POISON == UFFDIO_POISON, "UFFDIO_POISON");
#endif

/* ---- the object ---- */

enum { WRITTEN, FILLED, GUARDED, BARRED, NR_BITMAPS };

struct area {
	uint64_t start, end, page_size, origin;
	uint32_t mode;
	int gone;		    /* unregistered: its bits are final */
	uint64_t *bits[NR_BITMAPS]; /* one per page */
};

struct waiting {
	struct hv_fault fault;
	uint64_t since;
};

struct hv_uffd {
	pid_t pid;
	int fd;	      /* the userfaultfd */
	int wake_fd;  /* the thread shall look again */
	int ready_fd; /* readable: the queue is not empty, or all is closed */
	int stop_fd;  /* readable: no server is wanted */
	uint64_t features;

	pthread_mutex_t lock;
	pthread_cond_t left; /* users or answering became 0 */
	unsigned int users;
	int closed;
	int has_thread;
	pthread_t thread;

	/* Read: a page is brought in.  Write: a page is given up, unless it is there. */
	pthread_rwlock_t pages;

	struct waiting *queue; /* oldest first */
	size_t nr_queued, room;
	struct area *areas;
	size_t nr_areas;

	uint32_t who;
	int answering;	 /* the native thread uses the source */
	uint32_t server; /* thread id */
	uint64_t source, source_offset, source_end;
	int source_fd;
	uint64_t patience;
	struct hv_uffd_counts counts;
};

static int answer(int result)
{
	return result < 0 ? -errno : result;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void set(int event_fd)
{
	uint64_t one = 1;

	while (write(event_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

static void reset(int event_fd)
{
	uint64_t count;

	while (read(event_fd, &count, sizeof(count)) < 0 && errno == EINTR)
		;
}

/* For as long as `fd` is used.  A child of fork has no thread, and its locks may be held for ever.
 */
static int enter(struct hv_uffd *u)
{
	int error = 0;

	if (u->pid != getpid())
		return -ESRCH;
	pthread_mutex_lock(&u->lock);
	if (u->closed)
		error = -EBADF;
	else
		u->users++;
	pthread_mutex_unlock(&u->lock);
	return error;
}

static int leave(struct hv_uffd *u, int result)
{
	pthread_mutex_lock(&u->lock);
	if (--u->users == 0)
		pthread_cond_broadcast(&u->left);
	pthread_mutex_unlock(&u->lock);
	return result;
}

/* ---- ioctls ---- */

int hv_userfaultfd(uint32_t flags)
{
	uint32_t all = flags | O_CLOEXEC | O_NONBLOCK;
	int fd = (int)syscall(SYS_userfaultfd, all);
	int error = errno;

	if (fd < 0 && error == EPERM) {
		int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);

		if (device >= 0) {
			fd = ioctl(device, IOC_NEW, all);
			error = errno;
			close(device);
		}
	}
	return fd < 0 ? -error : fd;
}

int64_t hv_uffdio_api(int fd, uint64_t features)
{
	struct api api = {.api = API, .features = features};

	return ioctl(fd, IOC_API, &api) < 0 ? -errno : (int64_t)api.features;
}

/* The kernel does what it can, says in `done` how much or -errno why nothing, and EAGAIN where that
 * is not all.  Going on from there leads to the end, or to what was in the way. */
static int go_on(int result, int64_t got, uint64_t length, uint64_t *done)
{
	if (got > 0)
		*done += (uint64_t)got;
	if (result == 0 || *done >= length)
		return 0;
	if (errno != EAGAIN)
		return -errno;
	if (got <= 0)
		sched_yield(); /* the address space is changing */
	return 1;
}

static int copy(int fd, unsigned long request, struct copy what, uint64_t *done)
{
	int more;

	*done = 0;
	do {
		struct copy c = {what.dst + *done, what.src + *done, what.len - *done, what.mode,
				 0};
		int result = ioctl(fd, request, &c);

		more = go_on(result, c.done, what.len, done);
	} while (more > 0);
	return more;
}

static int fill(int fd, unsigned long request, uint64_t address, uint64_t length, uint64_t mode,
		uint64_t *done)
{
	int more;

	*done = 0;
	do {
		struct fill f = {{address + *done, length - *done}, mode, 0};
		int result = ioctl(fd, request, &f);

		more = go_on(result, f.done, length, done);
	} while (more > 0);
	return more;
}

static int wake(int fd, uint64_t address, uint64_t length)
{
	struct range range = {address, length};

	return answer(ioctl(fd, IOC_WAKE, &range));
}

static int protect(int fd, uint64_t address, uint64_t length, uint64_t mode)
{
	struct protection p = {{address, length}, mode};
	int tries = 0, error;

	do
		error = answer(ioctl(fd, IOC_WRITEPROTECT, &p));
	while (error == -EAGAIN && ++tries < 1000 && sched_yield() == 0);
	return error;
}

static int unregister(int fd, uint64_t address, uint64_t length)
{
	struct range range = {address, length};
	int error = answer(ioctl(fd, IOC_UNREGISTER, &range));

	/* The kernel wakes those who wait for missing pages only.  Nobody new comes: who faults
	 * after this finds a range like any other. */
	wake(fd, address, length);
	return error;
}

/* With the lock held. */
static struct area *area_of(struct hv_uffd *u, uint64_t address)
{
	for (size_t i = 0; i < u->nr_areas; i++) {
		if (address >= u->areas[i].start && address < u->areas[i].end)
			return &u->areas[i];
	}
	return NULL;
}

/* Pages that came in are guarded no more. */
static void forget_guards(struct hv_uffd *u, uint64_t address, uint64_t length)
{
	struct area *area;

	pthread_mutex_lock(&u->lock);
	area = area_of(u, address);
	for (uint64_t at = address; area && area->bits[GUARDED] && at < address + length;
	     at += area->page_size) {
		uint64_t page = (at - area->start) / area->page_size;

		area->bits[GUARDED][page / 64] &= ~(UINT64_C(1) << page % 64);
	}
	pthread_mutex_unlock(&u->lock);
}

/* Faults of a range that was answered need no other answer.  Who faulted there since is woken too,
 * and asks again. */
static void forget_faults(struct hv_uffd *u, uint64_t address, uint64_t length)
{
	size_t kept = 0, before;

	pthread_mutex_lock(&u->lock);
	before = u->nr_queued;
	for (size_t i = 0; i < before; i++) {
		if (u->queue[i].fault.address - address >= length)
			u->queue[kept++] = u->queue[i];
	}
	u->nr_queued = kept;
	if (before && !kept)
		reset(u->ready_fd);
	pthread_mutex_unlock(&u->lock);
	if (kept < before)
		wake(u->fd, address, length);
}

static void brought(struct hv_uffd *u, uint64_t address, uint64_t length, uint64_t mode)
{
	if (!length)
		return;
	forget_guards(u, address, length);
	if (!(mode & HV_UFFD_DONTWAKE))
		forget_faults(u, address, length);
}

static int bring(struct hv_uffd *u, unsigned long request, struct copy what, uint64_t *done)
{
	int error;

	pthread_rwlock_rdlock(&u->pages);
	error = copy(u->fd, request, what, done);
	brought(u, what.dst, *done, what.mode);
	pthread_rwlock_unlock(&u->pages);
	return error;
}

static int bring_fill(struct hv_uffd *u, unsigned long request, uint64_t address, uint64_t length,
		      uint64_t mode, uint64_t *done)
{
	int error;

	pthread_rwlock_rdlock(&u->pages);
	error = fill(u->fd, request, address, length, mode, done);
	brought(u, address, *done, mode);
	pthread_rwlock_unlock(&u->pages);
	return error;
}

int hv_uffd_copy(struct hv_uffd *u, uint64_t address, const void *source, uint64_t length,
		 uint32_t mode, uint64_t *done)
{
	return hv_uffd_copy_from(u, address, (uint64_t)(uintptr_t)source, length, mode, done);
}

int hv_uffd_copy_from(struct hv_uffd *u, uint64_t address, uint64_t source, uint64_t length,
		      uint32_t mode, uint64_t *done)
{
	struct copy what = {address, source, length, mode, 0};
	int error = enter(u);

	*done = 0;
	return error ? error : leave(u, bring(u, IOC_COPY, what, done));
}

int hv_uffd_move(struct hv_uffd *u, uint64_t address, uint64_t source, uint64_t length,
		 uint32_t mode, uint64_t *done)
{
	struct copy what = {address, source, length, 0, 0};
	int error = enter(u);

	/* UFFDIO_MOVE_MODE_DONTWAKE, UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES */
	what.mode = (mode & HV_UFFD_DONTWAKE ? 1 : 0) | (mode & HV_UFFD_HOLES ? 2 : 0);
	*done = 0;
	return error ? error : leave(u, bring(u, IOC_MOVE, what, done));
}

int hv_uffd_zeropage(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
		     uint64_t *done)
{
	int error = enter(u);

	*done = 0;
	return error ? error : leave(u, bring_fill(u, IOC_ZEROPAGE, address, length, mode, done));
}

int hv_uffd_continue(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
		     uint64_t *done)
{
	int error = enter(u);

	*done = 0;
	return error ? error : leave(u, bring_fill(u, IOC_CONTINUE, address, length, mode, done));
}

int hv_uffd_poison(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
		   uint64_t *done)
{
	int error = enter(u);

	*done = 0;
	return error ? error : leave(u, bring_fill(u, IOC_POISON, address, length, mode, done));
}

int hv_uffd_writeprotect(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode)
{
	/* UFFDIO_WRITEPROTECT_MODE_WP, UFFDIO_WRITEPROTECT_MODE_DONTWAKE: the latter when lifting
	 * only. */
	uint64_t bits = mode & HV_UFFD_PROTECT ? 1 : mode & HV_UFFD_DONTWAKE ? 2 : 0;
	int error = enter(u);

	if (error)
		return error;
	error = protect(u->fd, address, length, bits);
	if (!error && !bits)
		forget_faults(u, address, length);
	return leave(u, error);
}

int hv_uffd_wake(struct hv_uffd *u, uint64_t address, uint64_t length)
{
	int error = enter(u);

	return error ? error : leave(u, wake(u->fd, address, length));
}

/* ---- ranges ---- */

static void note(struct hv_uffd *u, uint64_t address, int which)
{
	struct area *area;

	pthread_mutex_lock(&u->lock);
	area = area_of(u, address);
	if (area && area->bits[which]) {
		uint64_t page = (address - area->start) / area->page_size;

		area->bits[which][page / 64] |= UINT64_C(1) << page % 64;
	}
	pthread_mutex_unlock(&u->lock);
}

static void free_area(struct area *area)
{
	for (int i = 0; i < NR_BITMAPS; i++)
		free(area->bits[i]);
}

static void *thread(void *arg);

/* With the lock held. */
static int start_thread(struct hv_uffd *u)
{
	sigset_t all, before;
	int error;

	if (u->has_thread)
		return 0;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	error = pthread_create(&u->thread, NULL, thread, u);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	u->has_thread = error == 0;
	return -error;
}

int64_t hv_uffd_register(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
			 uint64_t page_size, uint64_t origin)
{
	struct registration r = {{address, length}, mode & ~HV_UFFD_ASYNC, 0};
	struct area area = {address, address + length, page_size, origin, mode, 0, {NULL}};
	uint64_t nr_words = (length / page_size + 63) / 64;
	struct area *areas;
	int error = enter(u);

	if (error)
		return error;
	for (int i = 0; i < NR_BITMAPS && !(mode & HV_UFFD_ASYNC); i++) {
		area.bits[i] = calloc(nr_words, sizeof(uint64_t));
		if (!area.bits[i])
			error = -ENOMEM;
	}
	pthread_mutex_lock(&u->lock);
	if (!error && !(mode & HV_UFFD_ASYNC))
		error = start_thread(u);
	areas = realloc(u->areas, (u->nr_areas + 1) * sizeof(*areas));
	if (areas) {
		u->areas = areas;
		if (!error)
			areas[u->nr_areas++] = area;
	} else if (!error) {
		error = -ENOMEM;
	}
	pthread_mutex_unlock(&u->lock);
	if (error) {
		free_area(&area);
		return leave(u, error);
	}
	/* Known before the first fault can come. */
	if (ioctl(u->fd, IOC_REGISTER, &r) < 0) {
		error = -errno;
		pthread_mutex_lock(&u->lock);
		for (size_t i = 0; i < u->nr_areas; i++) {
			if (u->areas[i].start == address) {
				u->areas[i] = u->areas[--u->nr_areas];
				break;
			}
		}
		pthread_mutex_unlock(&u->lock);
		free_area(&area);
		return leave(u, error);
	}
	leave(u, 0);
	return (int64_t)(r.ioctls & INT64_MAX);
}

int hv_uffd_unregister(struct hv_uffd *u, uint64_t address, uint64_t length)
{
	struct area *area;
	int error = enter(u);

	if (error)
		return error;
	error = unregister(u->fd, address, length);
	if (error)
		return leave(u, error);
	/* A give_up() that has found the area is through with the page, and has noted it, or leaves
	 * it alone. */
	pthread_rwlock_wrlock(&u->pages);
	pthread_mutex_lock(&u->lock);
	area = area_of(u, address);
	if (area)
		area->gone = 1;
	pthread_mutex_unlock(&u->lock);
	pthread_rwlock_unlock(&u->pages);
	forget_faults(u, address, length);
	return leave(u, 0);
}

int hv_uffd_forget(struct hv_uffd *u, uint64_t address)
{
	struct area *area;
	int error = enter(u);

	if (error)
		return error;
	pthread_mutex_lock(&u->lock);
	area = area_of(u, address);
	if (area) {
		free_area(area);
		*area = u->areas[--u->nr_areas];
	}
	pthread_mutex_unlock(&u->lock);
	return leave(u, area ? 0 : -ENOENT);
}

int hv_uffd_take(struct hv_uffd *u, uint64_t address, uint32_t which, uint8_t *bits,
		 uint64_t nr_bytes)
{
	struct area *area;
	int error = enter(u);

	if (error)
		return error;
	pthread_mutex_lock(&u->lock);
	area = area_of(u, address);
	if (!area || which >= NR_BITMAPS) {
		error = -ENOENT;
	} else if (area->bits[which]) {
		uint64_t size = ((area->end - area->start) / area->page_size + 63) / 64 * 8;

		if (nr_bytes < size) {
			error = -EINVAL;
		} else {
			memcpy(bits, area->bits[which], size);
			memset(area->bits[which], 0, size);
		}
	}
	pthread_mutex_unlock(&u->lock);
	return leave(u, error);
}

/* ---- faults ---- */

static void count_failure(struct hv_uffd *u, int error)
{
	pthread_mutex_lock(&u->lock);
	u->counts.error = error;
	pthread_mutex_unlock(&u->lock);
}

/* Whether the page is in the page tables: then the fault was answered. */
static int is_there(uint64_t address)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t word = 0;

	if (fd < 0)
		return 0;
	if (pread(fd, &word, sizeof(word), (off_t)(address / PAGE * sizeof(word))) < 0)
		word = 0;
	close(fd);
	/* Present, or swapped; but the last type of swap entry marks pages that are not there. */
	return word >> 63 || (word >> 62 && (word & 31) != 31);
}

static int is_registered(struct hv_uffd *u, uint64_t address)
{
	struct area *area;
	int is;

	pthread_mutex_lock(&u->lock);
	area = area_of(u, address);
	is = area && !area->gone;
	pthread_mutex_unlock(&u->lock);
	return is;
}

static void give_up(struct hv_uffd *u, const struct hv_fault *fault)
{
	uint64_t page_size = PAGE, address;
	struct area *area;

	pthread_mutex_lock(&u->lock);
	area = area_of(u, fault->address);
	if (area)
		page_size = area->page_size;
	u->counts.given_up++;
	pthread_mutex_unlock(&u->lock);
	address = fault->address & -page_size;
	if (area && fault->flags & HV_UFFD_FAULT_WP) {
		/* Noted as the write that it is, for who asks what was written. */
		note(u, address, WRITTEN);
		if (protect(u->fd, address, page_size, 0))
			unregister(u->fd, address, page_size);
	} else if (area) {
		/* Not by UFFDIO_POISON: a vCPU that runs natively is sent SIGBUS for that. */
		pthread_rwlock_wrlock(&u->pages);
		if (is_registered(u, address) && !is_there(address)) {
			if (madvise((void *)address, page_size, GUARD_INSTALL) == 0)
				note(u, address, GUARDED);
			else if (mprotect((void *)address, page_size, PROT_NONE) == 0)
				note(u, address, BARRED);
			else
				unregister(u->fd, address, page_size);
		}
		pthread_rwlock_unlock(&u->pages);
	}
	wake(u->fd, address, page_size);
}

int hv_uffd_give_up(struct hv_uffd *u, const struct hv_fault *fault)
{
	int error = enter(u);

	if (error)
		return error;
	give_up(u, fault);
	return leave(u, 0);
}

/* A page of the source into `page`: what is behind its end is zero. */
static int read_source(int fd, uint64_t position, uint64_t end, uint8_t *page, uint64_t size)
{
	uint64_t done = 0;

	if (position < end && end - position < size)
		size = end - position;
	while (position < end && done < size) {
		ssize_t n = pread(fd, page + done, size - done, (off_t)(position + done));

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -errno;
		if (n == 0)
			break;
		done += (uint64_t)n;
	}
	return 0;
}

static int fill_missing(struct hv_uffd *u, const struct area *area, uint64_t address)
{
	uint64_t size = area->page_size, position, done;
	/* A page that comes in under write protection is seen when it is written first. */
	uint64_t mode = area->mode & HV_UFFD_WP ? HV_UFFD_COPY_WP : 0;
	struct copy what = {address, 0, size, mode, 0};
	uint8_t *page;
	int error = 0;

	position = u->source_offset + (address - area->origin);
	if (u->source && position + size <= u->source_end) {
		what.src = u->source + position;
		return copy(u->fd, IOC_COPY, what, &done);
	}
	if (!u->source && u->source_fd < 0 && !mode && size == PAGE) {
		error = fill(u->fd, IOC_ZEROPAGE, address, size, 0, &done);
		if (error != -EINVAL)
			return error;
	}
	page = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (page == MAP_FAILED)
		return -ENOMEM;
	if (u->source_fd >= 0)
		error = read_source(u->source_fd, position, u->source_end, page, size);
	what.src = (uint64_t)(uintptr_t)page;
	if (!error)
		error = copy(u->fd, IOC_COPY, what, &done);
	munmap(page, size);
	return error;
}

/* The native thread's answer. */
static void serve(struct hv_uffd *u, const struct hv_fault *fault)
{
	struct area area = {0}, *found;
	uint64_t address, done;
	int error;

	pthread_mutex_lock(&u->lock);
	found = area_of(u, fault->address);
	if (found)
		area = *found;
	pthread_mutex_unlock(&u->lock);
	if (!found) { /* unregistered meanwhile */
		wake(u->fd, fault->address & -PAGE, PAGE);
		return;
	}
	address = fault->address & -area.page_size;
	if (fault->flags & HV_UFFD_FAULT_WP) {
		note(u, address, WRITTEN);
		error = protect(u->fd, address, area.page_size, 0);
	} else if (fault->flags & HV_UFFD_FAULT_MINOR) {
		error = fill(u->fd, IOC_CONTINUE, address, area.page_size,
			     area.mode & HV_UFFD_WP ? HV_UFFD_COPY_WP : 0, &done);
	} else {
		note(u, address, FILLED);
		error = fill_missing(u, &area, address);
	}
	if (!error)
		forget_guards(u, address, area.page_size);
	if (error == -EEXIST) /* another fault has brought it in */
		error = wake(u->fd, address, area.page_size);
	if (error) {
		count_failure(u, error);
		give_up(u, fault);
	}
}

static void came_back(struct hv_uffd *u)
{
	pthread_mutex_lock(&u->lock);
	u->answering = 0;
	pthread_cond_broadcast(&u->left);
	pthread_mutex_unlock(&u->lock);
}

/* With the lock held; 0 where there is no room.  A thread waits for one page at a time: what it
 * waited for before is answered, or the same (the kernel asks again for an access of its own that a
 * signal has woken). */
static int push(struct hv_uffd *u, const struct hv_fault *fault)
{
	for (size_t i = 0; i < u->nr_queued; i++) {
		struct hv_fault *old = &u->queue[i].fault;

		if (old->thread != fault->thread)
			continue;
		if (old->address == fault->address && old->flags == fault->flags)
			return 1;
		if (fault->thread) {
			u->queue[i].fault = *fault;
			u->queue[i].since = now();
			return 1;
		}
	}
	if (u->nr_queued == u->room) {
		size_t room = u->room ? 2 * u->room : 64;
		struct waiting *queue = realloc(u->queue, room * sizeof(*queue));

		if (!queue)
			return 0;
		u->queue = queue;
		u->room = room;
	}
	u->queue[u->nr_queued].fault = *fault;
	u->queue[u->nr_queued++].since = now();
	if (u->nr_queued == 1)
		set(u->ready_fd);
	return 1;
}

/* With the lock held. */
static struct hv_fault pop(struct hv_uffd *u)
{
	struct hv_fault fault = u->queue[0].fault;

	memmove(u->queue, u->queue + 1, --u->nr_queued * sizeof(*u->queue));
	if (!u->nr_queued)
		reset(u->ready_fd);
	return fault;
}

static void take_in(struct hv_uffd *u, const struct message *message)
{
	struct hv_fault fault = {message->address, (uint32_t)message->flags, message->thread};
	int queued = 0, native;

	if (message->event != EVENT_PAGEFAULT)
		return;
	pthread_mutex_lock(&u->lock);
	if (fault.flags & HV_UFFD_FAULT_WP)
		u->counts.wp++;
	else if (fault.flags & HV_UFFD_FAULT_MINOR)
		u->counts.minor++;
	else
		u->counts.missing++;
	native = u->answering = u->who == HV_UFFD_NATIVE;
	/* The one who would answer waits itself. */
	if (!native && !(u->who == HV_UFFD_SERVED && u->server && u->server == fault.thread))
		queued = push(u, &fault);
	pthread_mutex_unlock(&u->lock);
	if (native) {
		serve(u, &fault);
		came_back(u);
	} else if (!queued) {
		give_up(u, &fault);
	}
}

/* What is in the queue that the thread shall see to: when it answers itself, or what is too old.
 * Returns the milliseconds until it has to look again, or -1. */
static int look_after_queue(struct hv_uffd *u)
{
	for (;;) {
		struct hv_fault fault;
		uint64_t age;
		int native;

		pthread_mutex_lock(&u->lock);
		native = u->who == HV_UFFD_NATIVE;
		if (!u->nr_queued || u->closed ||
		    (!native && (u->who != HV_UFFD_NOBODY || !u->patience))) {
			pthread_mutex_unlock(&u->lock);
			return -1;
		}
		age = now() - u->queue[0].since;
		if (!native && age < u->patience) {
			uint64_t rest = (u->patience - age) / 1000000 + 1;

			pthread_mutex_unlock(&u->lock);
			return rest < 1000000 ? (int)rest : 1000000;
		}
		fault = pop(u);
		u->answering = native;
		pthread_mutex_unlock(&u->lock);
		if (native) {
			serve(u, &fault);
			came_back(u);
		} else {
			give_up(u, &fault);
		}
	}
}

static void *thread(void *arg)
{
	struct hv_uffd *u = arg;
	struct pollfd fds[2] = {{u->fd, POLLIN, 0}, {u->wake_fd, POLLIN, 0}};

	for (;;) {
		struct message messages[16];
		int timeout = look_after_queue(u);
		ssize_t n;

		poll(fds, 2, timeout);
		if (fds[1].revents) {
			int closed;

			reset(u->wake_fd);
			pthread_mutex_lock(&u->lock);
			closed = u->closed;
			pthread_mutex_unlock(&u->lock);
			if (closed)
				return NULL;
		}
		n = read(u->fd, messages, sizeof(messages));
		for (ssize_t i = 0; i < n / (ssize_t)sizeof(messages[0]); i++)
			take_in(u, &messages[i]);
	}
}

int hv_uffd_next(struct hv_uffd *u, int timeout_ms, int server, struct hv_fault *out)
{
	struct pollfd fds[2] = {{u->ready_fd, POLLIN, 0}, {u->stop_fd, POLLIN, 0}};
	uint64_t until = timeout_ms < 0 ? 0 : now() + (uint64_t)timeout_ms * 1000000;
	int result = enter(u);

	if (result)
		return result;
	for (;;) {
		int rest = -1;

		pthread_mutex_lock(&u->lock);
		if (u->closed)
			result = -EBADF;
		else if (server && u->who != HV_UFFD_SERVED)
			result = -ECANCELED;
		else if (u->nr_queued) {
			*out = pop(u);
			result = 1;
		}
		pthread_mutex_unlock(&u->lock);
		if (result)
			return leave(u, result);
		if (timeout_ms >= 0) {
			uint64_t time = now();

			if (time >= until)
				return leave(u, 0);
			rest = (int)((until - time + 999999) / 1000000);
		}
		if (poll(fds, server ? 2 : 1, rest) < 0 && errno == EINTR)
			return leave(u, -EINTR);
	}
}

void hv_uffd_set_patience(struct hv_uffd *u, uint64_t ns)
{
	if (enter(u))
		return;
	pthread_mutex_lock(&u->lock);
	u->patience = ns;
	pthread_mutex_unlock(&u->lock);
	set(u->wake_fd);
	leave(u, 0);
}

int hv_uffd_serve(struct hv_uffd *u, uint32_t who, uint64_t source, int fd, uint64_t offset,
		  uint64_t end)
{
	int error = enter(u);

	if (error)
		return error;
	pthread_mutex_lock(&u->lock);
	if (u->who != HV_UFFD_NOBODY) {
		error = -EBUSY;
	} else {
		u->who = who;
		u->server = 0;
		u->source = source;
		u->source_fd = fd;
		u->source_offset = offset;
		u->source_end = end;
		reset(u->stop_fd);
	}
	pthread_mutex_unlock(&u->lock);
	if (!error)
		set(u->wake_fd);
	return leave(u, error);
}

int hv_uffd_server(struct hv_uffd *u)
{
	int error = enter(u);

	if (error)
		return error;
	pthread_mutex_lock(&u->lock);
	u->server = (uint32_t)syscall(SYS_gettid);
	pthread_mutex_unlock(&u->lock);
	return leave(u, 0);
}

int hv_uffd_stop(struct hv_uffd *u)
{
	uint64_t time = now();
	int error = enter(u);

	if (error)
		return error;
	pthread_mutex_lock(&u->lock);
	u->who = HV_UFFD_NOBODY;
	for (size_t i = 0; i < u->nr_queued; i++)
		u->queue[i].since = time;
	while (u->answering)
		pthread_cond_wait(&u->left, &u->lock);
	set(u->stop_fd);
	pthread_mutex_unlock(&u->lock);
	set(u->wake_fd); /* there may be faults in the queue that now have a time limit */
	return leave(u, 0);
}

int hv_uffd_get_counts(struct hv_uffd *u, struct hv_uffd_counts *out)
{
	int error = enter(u);

	if (error)
		return error;
	pthread_mutex_lock(&u->lock);
	*out = u->counts;
	pthread_mutex_unlock(&u->lock);
	return leave(u, 0);
}

/* ---- life ---- */

int hv_uffd_fd(struct hv_uffd *u)
{
	return u->fd;
}

int hv_uffd_ready_fd(struct hv_uffd *u)
{
	return u->ready_fd;
}

int hv_uffd_new(int fd, uint64_t features, struct hv_uffd **out)
{
	struct hv_uffd *u = calloc(1, sizeof(*u));
	int error = 0;

	*out = NULL;
	if (!u)
		return -ENOMEM;
	u->pid = getpid();
	u->fd = fd;
	u->features = features;
	u->source_fd = -1;
	u->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	u->ready_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	u->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (u->wake_fd < 0 || u->ready_fd < 0 || u->stop_fd < 0)
		error = -errno;
	if (error) {
		if (u->wake_fd >= 0)
			close(u->wake_fd);
		if (u->ready_fd >= 0)
			close(u->ready_fd);
		free(u);
		return error;
	}
	pthread_mutex_init(&u->lock, NULL);
	pthread_cond_init(&u->left, NULL);
	pthread_rwlock_init(&u->pages, NULL);
	*out = u;
	return 0;
}

static void close_all(struct hv_uffd *u)
{
	int *fds[] = {&u->fd, &u->wake_fd, &u->ready_fd, &u->stop_fd};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++) {
		if (*fds[i] >= 0)
			close(*fds[i]);
		*fds[i] = -1;
	}
}

int hv_uffd_close(struct hv_uffd *u)
{
	if (u->pid != getpid()) {
		u->closed = 1;
		close_all(u);
		return 0;
	}
	pthread_mutex_lock(&u->lock);
	if (u->closed) {
		pthread_mutex_unlock(&u->lock);
		return 0;
	}
	u->closed = 1;
	pthread_mutex_unlock(&u->lock);
	set(u->wake_fd);
	set(u->ready_fd);
	set(u->stop_fd);
	if (u->has_thread)
		pthread_join(u->thread, NULL);
	/* A child of fork may have the descriptor open too: closing ours does not end it then. */
	for (size_t i = 0; i < u->nr_areas; i++)
		unregister(u->fd, u->areas[i].start, u->areas[i].end - u->areas[i].start);
	pthread_mutex_lock(&u->lock);
	while (u->users)
		pthread_cond_wait(&u->left, &u->lock);
	for (size_t i = 0; i < u->nr_areas; i++)
		free_area(&u->areas[i]);
	u->nr_areas = u->nr_queued = 0;
	pthread_mutex_unlock(&u->lock);
	close_all(u);
	return 0;
}

void hv_uffd_free(struct hv_uffd *u)
{
	hv_uffd_close(u);
	if (u->pid == getpid()) {
		pthread_mutex_destroy(&u->lock);
		pthread_cond_destroy(&u->left);
		pthread_rwlock_destroy(&u->pages);
	}
	free(u->queue);
	free(u->areas);
	free(u);
}
