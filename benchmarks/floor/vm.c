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
#define IDENTITY_MAP 0xfffbc000ULL
#define TSS	     0xfffbd000UL

/* Let the guest see what KVM can give it; CPL3 needs long mode in CPUID. */
static int set_cpuid(struct floor_vm *v)
{
	struct kvm_cpuid2 *cpuid;
	int rc = 0;

	cpuid = calloc(1, sizeof(*cpuid) + NR_CPUID * sizeof(cpuid->entries[0]));
	if (!cpuid)
		return -ENOMEM;
	cpuid->nent = NR_CPUID;
	if (ioctl(v->kvm, KVM_GET_SUPPORTED_CPUID, cpuid) < 0 ||
	    ioctl(v->vcpu, KVM_SET_CPUID2, cpuid) < 0)
		rc = -errno;
	free(cpuid);
	return rc;
}

static int set_real_mode(struct floor_vm *v)
{
	struct kvm_regs regs = {.rip = ENTRY, .rflags = 2};
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

static int open_all(struct floor_vm *v, const void *image, uint64_t size, int cpuid)
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
	if (!rc && cpuid)
		rc = set_cpuid(v);
	return rc ? rc : set_real_mode(v);
}

int floor_vm_open(struct floor_vm *v, const void *image, uint64_t size, uint64_t ram_size,
		  int cpuid)
{
	int rc;

	*v = (struct floor_vm){.kvm = -1, .vm = -1, .vcpu = -1, .memfd = -1, .ram_size = ram_size};
	if (ENTRY + size > ram_size)
		return -EINVAL;
	rc = open_all(v, image, size, cpuid);
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
	if (v->ram) {
		struct kvm_userspace_memory_region none = {0};

		ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &none);
		munmap(v->ram, v->ram_size);
	}
	close_fd(v->memfd);
	if (v->run)
		munmap(v->run, v->run_size);
	close_fd(v->vcpu);
	close_fd(v->vm);
	close_fd(v->kvm);
}

struct floor_vm *floor_new(const void *image, uint64_t size, uint64_t ram_size, int cpuid)
{
	struct floor_vm *v = malloc(sizeof(*v));
	int rc = v ? floor_vm_open(v, image, size, ram_size, cpuid) : -ENOMEM;

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
