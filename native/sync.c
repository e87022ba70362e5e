// SPDX-License-Identifier: MIT
/*
 * The state, taken and put as QEMU does it: in the order of the parts that Python gives, with the
 * vCPU claimed from the first ioctl until it says whose the state is.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/ioctl.h>

#include "kvm_uapi.h"
#include "run.h"
#include "state.h"
#include "sync.h"

/* The state is Python's afterwards, also where a part was refused.  0; a word of HV_STATE_*; -errno
 * or HV_* as hv_claim(), and then nothing has changed. */
int64_t hv_sync_get(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr, uint8_t *block)
{
	int64_t rc = hv_claim_dirty(v);

	if (rc)
		return rc;
	rc = hv_vm_state_get(v->fd, parts, nr, block);
	v->dirty = 1;
	hv_unclaim(v);
	return rc;
}

/* The state is KVM's afterwards, unless a part was refused.  `cr8` is for the next KVM_RUN, which
 * loads it where KVM has no APIC.  As above. */
int64_t hv_sync_put(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr,
		    const uint8_t *block, uint64_t cr8)
{
	int64_t rc = hv_claim_dirty(v);

	if (rc)
		return rc;
	rc = hv_vm_state_put(v->fd, parts, nr, block, 0);
	if (!rc) {
		hv_keep_cr8(v, cr8);
		v->dirty = 0;
	}
	hv_unclaim(v);
	return rc;
}

/* Say whose it is, without a get or put.  0; as hv_claim(). */
int64_t hv_sync_mark(struct hv_vcpu *v, uint32_t dirty)
{
	int64_t rc = hv_claim_dirty(v);

	if (rc)
		return rc;
	v->dirty = dirty;
	hv_unclaim(v);
	return 0;
}

#define GET_EVENTS _IOR(0xAE, 0x9f, struct kvm_vcpu_events)
#define SET_EVENTS _IOW(0xAE, 0xa0, struct kvm_vcpu_events)
#define ENABLE_CAP _IOW(0xAE, 0xa3, struct kvm_enable_cap)

static int switch_triple_fault_event(int vm_fd, uint64_t on)
{
	struct kvm_enable_cap cap = {.cap = KVM_CAP_X86_TRIPLE_FAULT_EVENT, .args = {on}};

	return ioctl(vm_fd, ENABLE_CAP, &cap);
}

/*
 * KVM_SET_VCPU_EVENTS (NULL: of what is there), and no triple fault waits afterwards.  KVM knows
 * such a thing only while the VM has KVM_CAP_X86_TRIPLE_FAULT_EVENT, which is on for this long only
 * unless it was; where there is none (before Linux 6.1) it is left out.  0 or -errno.
 */
int hv_events_put_calm(int fd, int vm_fd, const struct kvm_vcpu_events *events)
{
	struct kvm_vcpu_events now, wanted;
	bool was_on, is_on;
	int rc = 0;

	if (ioctl(fd, GET_EVENTS, &now))
		return -errno;
	was_on = now.flags & KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
	is_on = was_on || !switch_triple_fault_event(vm_fd, 1);
	wanted = events ? *events : now;
	if (is_on) {
		wanted.flags |= KVM_VCPUEVENT_VALID_TRIPLE_FAULT;
		wanted.triple_fault.pending = 0;
	}
	if (ioctl(fd, SET_EVENTS, &wanted))
		rc = -errno;
	if (is_on && !was_on)
		switch_triple_fault_event(vm_fd, 0);
	return rc;
}
