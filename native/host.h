/*
 * Linux without KVM: the calls behind hvmodel.host.
 *
 * Each is the system call of the same name, seen by Python as one value: what the call returned, or
 * -errno. Addresses are passed as integers, because most of them are nobody's C objects.  The
 * constants have a prefix of ours so that they can stand beside any libc's; host.c proves that they
 * are the system's.
 */
#define HV_MFD_CLOEXEC	     0x1
#define HV_MFD_ALLOW_SEALING 0x2
#define HV_MFD_HUGETLB	     0x4
#define HV_MFD_NOEXEC_SEAL   0x8  /* since Linux 6.3 */
#define HV_MFD_EXEC	     0x10 /* since Linux 6.3 */
#define HV_MFD_HUGE_SHIFT    26	  /* log2 of the page size begins at this bit */

#define HV_F_SEAL_SEAL	       0x1
#define HV_F_SEAL_SHRINK       0x2
#define HV_F_SEAL_GROW	       0x4
#define HV_F_SEAL_WRITE	       0x8
#define HV_F_SEAL_FUTURE_WRITE 0x10 /* since Linux 5.1 */
#define HV_F_SEAL_EXEC	       0x20 /* since Linux 6.3 */

#define HV_PROT_NONE  0x0
#define HV_PROT_READ  0x1
#define HV_PROT_WRITE 0x2
#define HV_PROT_EXEC  0x4

#define HV_MAP_SHARED	       0x1
#define HV_MAP_PRIVATE	       0x2
#define HV_MAP_SHARED_VALIDATE 0x3
#define HV_MAP_FIXED	       0x10
#define HV_MAP_ANONYMOUS       0x20
#define HV_MAP_NORESERVE       0x4000
#define HV_MAP_SYNC	       0x80000

#define HV_MADV_WILLNEED       3
#define HV_MADV_DONTNEED       4
#define HV_MADV_REMOVE	       9
#define HV_MADV_DONTFORK       10
#define HV_MADV_DOFORK	       11
#define HV_MADV_MERGEABLE      12
#define HV_MADV_UNMERGEABLE    13
#define HV_MADV_HUGEPAGE       14
#define HV_MADV_NOHUGEPAGE     15
#define HV_MADV_DONTDUMP       16
#define HV_MADV_DODUMP	       17
#define HV_MADV_COLD	       20
#define HV_MADV_PAGEOUT	       21
#define HV_MADV_POPULATE_READ  22  /* since Linux 5.14 */
#define HV_MADV_POPULATE_WRITE 23  /* since Linux 5.14 */
#define HV_MADV_COLLAPSE       25  /* since Linux 6.1 */
#define HV_MADV_GUARD_INSTALL  102 /* since Linux 6.13; 6.15 for files */
#define HV_MADV_GUARD_REMOVE   103

#define HV_FALLOC_FL_KEEP_SIZE	0x1
#define HV_FALLOC_FL_PUNCH_HOLE 0x2

int hv_memfd_create(const char *name, uint32_t flags);
int hv_ftruncate(int fd, int64_t size);
int hv_add_seals(int fd, int seals);
int hv_get_seals(int fd);
int hv_fallocate(int fd, int mode, int64_t offset, int64_t length);

/* Bytes of a page of the file: of hugetlbfs its own, else the host's. */
int64_t hv_fd_page_size(int fd);

/* The address is >= 0: user addresses end far below 2^63. */
int64_t hv_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd, int64_t offset);
int hv_munmap(uint64_t address, uint64_t length);
int hv_mprotect(uint64_t address, uint64_t length, int prot);
int hv_madvise(uint64_t address, uint64_t length, int advice);
int hv_msync(uint64_t address, uint64_t length); /* MS_SYNC */

/*
 * Maps memory at an address that is a multiple of `align`, with an inaccessible page behind it: a
 * reservation of length + align bytes, the mapping at the first aligned address in it, and what is
 * left of the reservation unmapped but for one page.  With `align` 0 it is mmap.  What HV_MAP_SYNC
 * in the flags asks for, which goes with HV_MAP_SHARED_VALIDATE, is tried without where it is
 * refused; then *unsynced is that errno, else 0.
 */
int64_t hv_ram_mmap(uint64_t length, uint64_t align, int prot, int flags, int fd, int64_t offset,
		    int *unsynced);

/* In a child of fork: something to look at where nothing was inherited. */
int hv_mmap_stand_in(uint64_t address, uint64_t length);

/*
 * How many of the host's pages in the range have no memory yet: of those mincore(2) does not see,
 * or with `copies` of those that are no private copies (/proc/self/pagemap).
 */
int64_t hv_nr_missing(uint64_t address, uint64_t length, int copies);

/*
 * Copies between a buffer and memory of this process that may fault: process_vm_readv/writev on
 * ourselves, which answer where a memcpy would die of SIGSEGV or SIGBUS.  They return the bytes
 * copied, which are fewer than asked for where the rest is not accessible, or -errno where already
 * the first is not.
 */
int64_t hv_vm_read(uint64_t address, void *data, uint64_t size);
int64_t hv_vm_write(uint64_t address, const void *data, uint64_t size);
