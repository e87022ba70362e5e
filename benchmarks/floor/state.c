/*
 * All of a vCPU's state got and put in C: the ioctls of hvmodel.state, in its orders.  What the
 * host does not have is left out; there is no in-kernel APIC.
 */
#include "vm.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#define NR_CPUID	     256
#define NR_MSRS		     255
#define NR_BANKS	     32 /* of a vCPU for which nothing else was asked */
#define MSR_TSC_DEADLINE     0x6e0
#define MSR_KVM_ASYNC_PF_INT 0x4b564d06
#define MSR_KVM_ASYNC_PF_EN  0x4b564d02
#define XSAVE_ROOM	     65536
#define NESTED_ROOM	     65536

struct floor_state {
	struct kvm_mp_state mp_state;
	struct kvm_vcpu_events events;
	struct kvm_regs regs;
	struct kvm_sregs2 sregs2;
	struct kvm_xcrs xcrs;
	struct kvm_debugregs debugregs;
	int khz;
	int has_nested;
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entries[NR_MSRS];
	} msrs;
	struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[NR_CPUID];
	} cpuid;
	union {
		struct kvm_xsave area;
		uint8_t room[XSAVE_ROOM];
	} xsave;
	union {
		struct kvm_nested_state head;
		uint8_t room[NESTED_ROOM];
	} nested;
};

/* Adds the MSRs from `first` on, as far as they can be read. */
static void add_msrs(struct floor_vm *v, struct floor_state *s, uint32_t first, uint32_t nr)
{
	struct {
		struct kvm_msrs head;
		struct kvm_msr_entry entry;
	} one = {.head.nmsrs = 1};

	for (uint32_t i = first; i < first + nr && s->msrs.head.nmsrs < NR_MSRS; i++) {
		one.entry.index = i;
		if (ioctl(v->vcpu, KVM_GET_MSRS, &one) == 1)
			s->msrs.entries[s->msrs.head.nmsrs++].index = i;
	}
}

/* The MSRs that are got and put: MTRRs, machine-check banks, and KVM's list, those that depend on
 * others at its end. */
static int list_msrs(struct floor_vm *v, struct floor_state *s)
{
	struct {
		struct kvm_msr_list head;
		uint32_t indices[NR_MSRS];
	} list = {.head.nmsrs = NR_MSRS};
	static const uint32_t last[] = {MSR_KVM_ASYNC_PF_EN, MSR_TSC_DEADLINE};
	struct kvm_msr_entry *entries = s->msrs.entries;
	uint32_t nr;

	if (ioctl(v->kvm, KVM_GET_MSR_INDEX_LIST, &list) < 0)
		return -errno;
	add_msrs(v, s, 0x2ff, 1);
	add_msrs(v, s, 0x250, 1);
	add_msrs(v, s, 0x258, 2);
	add_msrs(v, s, 0x268, 8);
	add_msrs(v, s, 0x200, 16);
	add_msrs(v, s, 0x400, 4 * NR_BANKS);
	add_msrs(v, s, 0x280, NR_BANKS);
	nr = s->msrs.head.nmsrs;
	if (nr + list.head.nmsrs > NR_MSRS)
		return -E2BIG;
	for (uint32_t i = 0; i < list.head.nmsrs; i++)
		if (list.indices[i] != last[0] && list.indices[i] != last[1] &&
		    list.indices[i] != MSR_KVM_ASYNC_PF_INT)
			entries[nr++].index = list.indices[i];
	for (uint32_t at = 0; at < 2; at++)
		for (uint32_t i = 0; i < list.head.nmsrs; i++)
			if (list.indices[i] == last[at])
				entries[nr++].index = last[at];
	s->msrs.head.nmsrs = nr;
	return 0;
}

struct floor_state *floor_state_new(struct floor_vm *v)
{
	struct floor_state *s = calloc(1, sizeof(*s));
	int rc;

	if (!s)
		return NULL;
	rc = list_msrs(v, s);
	s->cpuid.head.nent = NR_CPUID;
	s->has_nested = ioctl(v->vm, KVM_CHECK_EXTENSION, KVM_CAP_NESTED_STATE) > 0;
	if (!rc && ioctl(v->vm, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2) > XSAVE_ROOM)
		rc = -E2BIG;
	/* As many entries as there are. */
	if (!rc && ioctl(v->vcpu, KVM_GET_CPUID2, &s->cpuid) < 0)
		rc = -errno;
	if (rc) {
		free(s);
		errno = -rc;
		return NULL;
	}
	return s;
}

void floor_state_free(struct floor_state *s)
{
	free(s);
}

/* 1: all went well. */
static int get_msrs(int fd, struct floor_state *s)
{
	return ioctl(fd, KVM_GET_MSRS, &s->msrs) == (int)s->msrs.head.nmsrs;
}

static int set_msrs(int fd, struct floor_state *s)
{
	return ioctl(fd, KVM_SET_MSRS, &s->msrs) == (int)s->msrs.head.nmsrs;
}

/* Bytes of MSRs and entries of CPUID, or -errno, having got the whole state `nr` times. */
int64_t floor_state_get(struct floor_vm *v, struct floor_state *s, uint64_t nr)
{
	int fd = v->vcpu;

	for (uint64_t i = 0; i < nr; i++) {
		if (ioctl(fd, KVM_GET_MP_STATE, &s->mp_state) < 0 ||
		    ioctl(fd, KVM_GET_VCPU_EVENTS, &s->events) < 0 ||
		    ioctl(fd, KVM_GET_REGS, &s->regs) < 0 ||
		    ioctl(fd, KVM_GET_XSAVE2, &s->xsave) < 0 ||
		    ioctl(fd, KVM_GET_XCRS, &s->xcrs) < 0 ||
		    ioctl(fd, KVM_GET_SREGS2, &s->sregs2) < 0 || !get_msrs(fd, s) ||
		    ioctl(fd, KVM_GET_DEBUGREGS, &s->debugregs) < 0 ||
		    ioctl(fd, KVM_GET_CPUID2, &s->cpuid) < 0)
			return errno ? -errno : -EPROTO;
		s->khz = ioctl(fd, KVM_GET_TSC_KHZ, 0);
		s->nested.head.size = NESTED_ROOM;
		if (s->has_nested && ioctl(fd, KVM_GET_NESTED_STATE, &s->nested) < 0)
			return -errno;
	}
	return s->msrs.head.nmsrs * 1000 + s->cpuid.head.nent;
}

/* The same, having put it `nr` times. */
int64_t floor_state_put(struct floor_vm *v, struct floor_state *s, uint64_t nr)
{
	int fd = v->vcpu;

	for (uint64_t i = 0; i < nr; i++) {
		if (ioctl(fd, KVM_SET_CPUID2, &s->cpuid) < 0 ||
		    (s->khz > 0 && ioctl(fd, KVM_SET_TSC_KHZ, (unsigned long)s->khz) < 0) ||
		    ioctl(fd, KVM_SET_SREGS2, &s->sregs2) < 0 ||
		    ioctl(fd, KVM_SET_REGS, &s->regs) < 0 ||
		    ioctl(fd, KVM_SET_XSAVE, &s->xsave) < 0 ||
		    ioctl(fd, KVM_SET_XCRS, &s->xcrs) < 0 || !set_msrs(fd, s) ||
		    ioctl(fd, KVM_SET_DEBUGREGS, &s->debugregs) < 0 ||
		    ioctl(fd, KVM_SET_MP_STATE, &s->mp_state) < 0 ||
		    ioctl(fd, KVM_SET_VCPU_EVENTS, &s->events) < 0)
			return errno ? -errno : -EPROTO;
		if (s->has_nested && ioctl(fd, KVM_SET_NESTED_STATE, &s->nested) < 0)
			return -errno;
	}
	return s->msrs.head.nmsrs * 1000 + s->cpuid.head.nent;
}
