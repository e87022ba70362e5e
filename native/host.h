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

#define HV_MAP_SHARED	 0x1
#define HV_MAP_PRIVATE	 0x2
#define HV_MAP_ANONYMOUS 0x20

int hv_memfd_create(const char *name, uint32_t flags);
int hv_ftruncate(int fd, int64_t size);
int hv_add_seals(int fd, int seals);
int hv_get_seals(int fd);

/* The address is >= 0: user addresses end far below 2^63. */
int64_t hv_mmap(uint64_t address, uint64_t length, int prot, int flags, int fd, int64_t offset);
int hv_munmap(uint64_t address, uint64_t length);
int hv_mprotect(uint64_t address, uint64_t length, int prot);

/*
 * Copies between a buffer and memory of this process that may fault: process_vm_readv/writev on
 * ourselves, which answer where a memcpy would die of SIGSEGV or SIGBUS.  They return the bytes
 * copied, which are fewer than asked for where the rest is not accessible, or -errno where already
 * the first is not.
 */
int64_t hv_vm_read(uint64_t address, void *data, uint64_t size);
int64_t hv_vm_write(uint64_t address, const void *data, uint64_t size);
