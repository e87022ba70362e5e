#define _GNU_SOURCE
#include "vm.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define ENTRY	 0x7c00
#define NR_CPUID 256

/* Where an Intel CPU that cannot run real mode itself keeps what it needs for that. */
#define IDENTITY_MAP 0xfeffc000ULL
#define TSS	     0xfeffd000UL

/*
 * What KVM can give a guest, kept for all lives: it does not change, and asking takes longer than
 * all else.  NULL and errno when it cannot be had.
 */
static const struct kvm_cpuid2 *supported_cpuid(int kvm)
{
	static struct kvm_cpuid2 *kept;
	struct kvm_cpuid2 *cpuid;

	if (kept)
		return kept;
	cpuid = calloc(1, sizeof(*cpuid) + NR_CPUID * sizeof(cpuid->entries[0]));
	if (!cpuid)
		return NULL;
	cpuid->nent = NR_CPUID;
	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid) < 0) {
		free(cpuid);
		return NULL;
	}
	kept = cpuid;
	return kept;
}

/* CPL3 needs long mode in CPUID. */
static int set_cpuid(struct floor_vm *v)
{
	const struct kvm_cpuid2 *cpuid = supported_cpuid(v->kvm);

	return cpuid && ioctl(v->vcpu, KVM_SET_CPUID2, cpuid) == 0 ? 0 : -errno;
}

static int set_events(struct floor_vm *v)
{
	struct kvm_vcpu_events events = {.flags = KVM_VCPUEVENT_VALID_NMI_PENDING |
						  KVM_VCPUEVENT_VALID_SHADOW};
	struct kvm_mp_state state = {.mp_state = KVM_MP_STATE_RUNNABLE};

	if (ioctl(v->vcpu, KVM_SET_VCPU_EVENTS, &events) < 0 ||
	    ioctl(v->vcpu, KVM_SET_MP_STATE, &state) < 0)
		return -errno;
	return 0;
}

static int set_real_mode(struct floor_vm *v)
{
	struct kvm_regs regs = {.rip = ENTRY, .rsp = ENTRY, .rflags = 2};
	struct kvm_sregs sregs;

	if (ioctl(v->vcpu, KVM_GET_SREGS, &sregs) < 0)
		return -errno;
	sregs.cs.selector = 0;
	sregs.cs.base = 0;
	if (ioctl(v->vcpu, KVM_SET_SREGS, &sregs) < 0 || ioctl(v->vcpu, KVM_SET_REGS, &regs) < 0)
		return -errno;
	return 0;
}

static int map_ram(struct floor_vm *v)
{
	struct kvm_userspace_memory_region slot = {0};
	void *ram;

	v->memfd = memfd_create("floor.ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (v->memfd < 0 || ftruncate(v->memfd, (off_t)v->ram_size) < 0 ||
	    fcntl(v->memfd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK) < 0)
		return -errno;
	ram = mmap(NULL, v->ram_size, PROT_READ | PROT_WRITE, MAP_SHARED, v->memfd, 0);
	if (ram == MAP_FAILED)
		return -errno;
	v->ram = ram;
	slot.memory_size = v->ram_size;
	slot.userspace_addr = (uintptr_t)v->ram;
	return ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0 ? -errno : 0;
}

static int map_run(struct floor_vm *v)
{
	int size = ioctl(v->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	void *run;

	if (size < 0)
		return -errno;
	run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);
	if (run == MAP_FAILED)
		return -errno;
	v->run = run;
	v->run_size = (size_t)size;
	return 0;
}

static int open_all(struct floor_vm *v, const void *image, uint64_t size, int flags)
{
	uint64_t identity_map = IDENTITY_MAP;
	int rc;

	v->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (v->kvm < 0)
		return -errno;
	do
		v->vm = ioctl(v->kvm, KVM_CREATE_VM, 0);
	while (v->vm < 0 && errno == EINTR); /* it gives up at any pending signal */
	if (v->vm < 0)
		return -errno;
	if (ioctl(v->vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map) < 0 ||
	    ioctl(v->vm, KVM_SET_TSS_ADDR, TSS) < 0)
		return -errno;
	rc = map_ram(v);
	if (rc)
		return rc;
	memcpy(v->ram + ENTRY, image, size);
	v->vcpu = ioctl(v->vm, KVM_CREATE_VCPU, 0);
	if (v->vcpu < 0)
		return -errno;
	rc = map_run(v);
	if (!rc && flags & FLOOR_MACHINE)
		v->run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
	if (!rc && flags & FLOOR_CPUID)
		rc = set_cpuid(v);
	if (!rc)
		rc = set_real_mode(v);
	if (!rc && flags & FLOOR_MACHINE)
		rc = set_events(v);
	return rc;
}

int floor_vm_open(struct floor_vm *v, const void *image, uint64_t size, uint64_t ram_size,
		  int flags)
{
	int rc;

	*v = (struct floor_vm){.kvm = -1, .vm = -1, .vcpu = -1, .memfd = -1, .ram_size = ram_size};
	if (ENTRY + size > ram_size)
		return -EINVAL;
	rc = open_all(v, image, size, flags);
	if (rc)
		floor_vm_close(v);
	return rc;
}

static void close_fd(int fd)
{
	if (fd >= 0)
		close(fd);
}

void floor_vm_close(struct floor_vm *v)
{
	if (v->run)
		munmap(v->run, v->run_size);
	close_fd(v->vcpu);
	close_fd(v->vm);
	if (v->ram)
		munmap(v->ram, v->ram_size);
	close_fd(v->memfd);
	close_fd(v->kvm);
}

struct floor_vm *floor_new(const void *image, uint64_t size, uint64_t ram_size, int flags)
{
	struct floor_vm *v = malloc(sizeof(*v));
	int rc = v ? floor_vm_open(v, image, size, ram_size, flags) : -ENOMEM;

	if (rc) {
		free(v);
		errno = -rc;
		return NULL;
	}
	return v;
}

void floor_free(struct floor_vm *v)
{
	floor_vm_close(v);
	free(v);
}
