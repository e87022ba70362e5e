/*
 * Page faults answered by this process: the calls behind hvmodel.host.userfaultfd.
 *
 * Calls return 0 or more, or -errno.  Each hv_uffd has one thread of its own from the first range
 * whose faults wait.  It reads every fault, and answers it (HV_UFFD_NATIVE), or queues it for
 * hv_uffd_next().  A fault that nobody takes out of the queue in time is given up, so that its
 * thread does not wait for ever: see hv_uffd_give_up().
 */
#define HV_UFFD_USER_MODE_ONLY 0x1

#define HV_UFFD_FEATURE_MISSING_HUGETLBFS  0x10
#define HV_UFFD_FEATURE_MISSING_SHMEM	   0x20
#define HV_UFFD_FEATURE_SIGBUS		   0x80
#define HV_UFFD_FEATURE_THREAD_ID	   0x100
#define HV_UFFD_FEATURE_MINOR_HUGETLBFS	   0x200
#define HV_UFFD_FEATURE_MINOR_SHMEM	   0x400
#define HV_UFFD_FEATURE_EXACT_ADDRESS	   0x800
#define HV_UFFD_FEATURE_WP_HUGETLBFS_SHMEM 0x1000
#define HV_UFFD_FEATURE_WP_UNPOPULATED	   0x2000
#define HV_UFFD_FEATURE_POISON		   0x4000
#define HV_UFFD_FEATURE_WP_ASYNC	   0x8000
#define HV_UFFD_FEATURE_MOVE		   0x10000

/* Modes of a range; the kernel's bits, and ours for a range whose write faults do not wait. */
#define HV_UFFD_MISSING 0x1
#define HV_UFFD_WP	0x2
#define HV_UFFD_MINOR	0x4
#define HV_UFFD_ASYNC	0x100

/* Of a fault. */
#define HV_UFFD_FAULT_WRITE 0x1
#define HV_UFFD_FAULT_WP    0x2
#define HV_UFFD_FAULT_MINOR 0x4

#define HV_UFFD_DONTWAKE 0x1 /* of every call that answers: the waiting threads are not woken */
#define HV_UFFD_COPY_WP	 0x2 /* of copy and continue: the page comes in write-protected */
#define HV_UFFD_PROTECT	 0x4 /* of writeprotect: protect; without it, lift */
#define HV_UFFD_HOLES	 0x8 /* of move: missing pages of the source are skipped */

/* Who answers. */
#define HV_UFFD_NOBODY 0 /* who calls hv_uffd_next() in time */
#define HV_UFFD_SERVED 1 /* who calls hv_uffd_next(), however late */
#define HV_UFFD_NATIVE 2 /* the thread itself */

struct hv_fault {
	uint64_t address;
	uint32_t flags;
	uint32_t thread;
};

/* What there was so far. */
struct hv_uffd_counts {
	uint64_t missing; /* faults by kind */
	uint64_t minor;
	uint64_t wp;
	uint64_t given_up;
	int32_t error; /* -errno of the last answer of the thread that failed */
};

struct hv_uffd;

int hv_userfaultfd(uint32_t flags); /* userfaultfd(2), or /dev/userfaultfd where that is refused */
int64_t hv_uffdio_api(int fd, uint64_t features); /* the features there are */

/* Takes the descriptor over; -errno leaves it to the caller. */
int hv_uffd_new(int fd, uint64_t features, struct hv_uffd **out);
/* Wakes who waits and ends what was registered; twice is fine.  In a child of fork, closes its
 * descriptors only. */
int hv_uffd_close(struct hv_uffd *u);
void hv_uffd_free(struct hv_uffd *u);
int hv_uffd_fd(struct hv_uffd *u);
int hv_uffd_ready_fd(struct hv_uffd *u); /* readable while a fault is queued */

/* `origin`: the address that answers count the source's bytes from. */
int64_t hv_uffd_register(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
			 uint64_t page_size, uint64_t origin);
/* Its bits can be taken until it is forgotten. */
int hv_uffd_unregister(struct hv_uffd *u, uint64_t address, uint64_t length);
int hv_uffd_forget(struct hv_uffd *u, uint64_t address);

/* `done` is how many bytes were; -errno is why not the next one. */
int hv_uffd_copy(struct hv_uffd *u, uint64_t address, const void *source, uint64_t length,
		 uint32_t mode, uint64_t *done);
int hv_uffd_copy_from(struct hv_uffd *u, uint64_t address, uint64_t source, uint64_t length,
		      uint32_t mode, uint64_t *done);
int hv_uffd_zeropage(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
		     uint64_t *done);
int hv_uffd_continue(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
		     uint64_t *done);
int hv_uffd_poison(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode,
		   uint64_t *done);
int hv_uffd_move(struct hv_uffd *u, uint64_t address, uint64_t source, uint64_t length,
		 uint32_t mode, uint64_t *done);
int hv_uffd_writeprotect(struct hv_uffd *u, uint64_t address, uint64_t length, uint32_t mode);
int hv_uffd_wake(struct hv_uffd *u, uint64_t address, uint64_t length);

/* 1: a fault; 0: timeout; -EINTR: a signal; -EBADF: closed; -ECANCELED: `server` is no longer
 * wanted. Negative timeouts wait for ever. */
int hv_uffd_next(struct hv_uffd *u, int timeout_ms, int server, struct hv_fault *out);
/* The access fails from now on (the page is guarded), or where the page is there already goes on (a
 * write protection is lifted). */
int hv_uffd_give_up(struct hv_uffd *u, const struct hv_fault *fault);
/* For how long a fault may wait in the queue while nobody serves; 0 is for ever. */
void hv_uffd_set_patience(struct hv_uffd *u, uint64_t ns);

/* Who answers from now on; -EBUSY if somebody else does already.  As the native thread does it:
 * missing pages are zero, or come from `source` (an address) or `fd`, both from `offset` on and up
 * to `end`, where zeros follow; minor faults are continued; a write to a protected page is noted
 * and allowed. */
int hv_uffd_serve(struct hv_uffd *u, uint32_t who, uint64_t source, int fd, uint64_t offset,
		  uint64_t end);
int hv_uffd_stop(struct hv_uffd *u);
int hv_uffd_server(struct hv_uffd *u); /* this thread is the server: its own faults are given up */

/* The bits of pages written (0) or filled (1) by the native thread, or given up: guarded (2), or
 * made inaccessible (3) where the kernel has no guards.  They are cleared. */
int hv_uffd_take(struct hv_uffd *u, uint64_t address, uint32_t which, uint8_t *bits,
		 uint64_t nr_bytes);
int hv_uffd_get_counts(struct hv_uffd *u, struct hv_uffd_counts *out);
