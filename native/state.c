// SPDX-License-Identifier: MIT
/*
 * State: the ioctls of a list of parts, one after the other, with nothing between them.
 *
 * KVM takes at most 255 MSRs at a time.  More are copied through a table on the stack; up to that
 * many go as they lie in the block.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm_uapi.h"
#include "run.h"
#include "state.h"

#define MSRS_AT_ONCE	  255 /* linux:arch/x86/kvm/x86.c MAX_IO_MSRS@v6.18, less one */
#define MAX_CPUID_ENTRIES 256 /* linux:arch/x86/include/asm/kvm_host.h@v6.18 */

struct msr_table {
	struct kvm_msrs head;
	struct kvm_msr_entry entries[MSRS_AT_ONCE];
};

/* An answer, but for the number of the part. */
static int64_t failed(int error, uint32_t done)
{
	return HV_STATE_FAILED | (int64_t)error << HV_STATE_ERROR_SHIFT |
	       (int64_t)done << HV_STATE_DONE_SHIFT;
}

static int64_t resized(uint32_t size)
{
	return HV_STATE_RESIZED | (int64_t)size << HV_STATE_DONE_SHIFT;
}

static int64_t with_part(int64_t rc, uint32_t at)
{
	return rc ? rc | (int64_t)at << HV_STATE_AT_SHIFT : 0;
}

static uint32_t min32(uint32_t a, uint32_t b)
{
	return a < b ? a : b;
}

/*
 * Gets or puts the MSRs that `msrs` lists, but for the first `at` of them; `to`: where the values
 * go, NULL for a put.
 */
static int64_t do_msrs(int fd, uint64_t request, const struct kvm_msrs *msrs, uint32_t at,
		       struct kvm_msrs *to)
{
	struct msr_table table;
	uint32_t nr;
	int done;

	if (!at && msrs->nmsrs <= MSRS_AT_ONCE) {
		done = ioctl(fd, request, msrs);
		if (done < 0)
			return failed(errno, 0);
		return (uint32_t)done < msrs->nmsrs ? failed(0, (uint32_t)done) : 0;
	}
	for (; at < msrs->nmsrs; at += nr) {
		nr = min32(msrs->nmsrs - at, MSRS_AT_ONCE);
		table.head.nmsrs = nr;
		table.head.pad = 0;
		memcpy(table.entries, &msrs->entries[at], nr * sizeof(table.entries[0]));
		done = ioctl(fd, request, &table);
		if (done < 0)
			return failed(errno, at);
		if (to)
			memcpy(&to->entries[at], table.entries, nr * sizeof(table.entries[0]));
		if ((uint32_t)done < nr)
			return failed(0, at + (uint32_t)done);
	}
	return 0;
}

static int64_t get_cpuid(int fd, const struct hv_part *part, struct kvm_cpuid2 *cpuid)
{
	const uint32_t entry = sizeof(cpuid->entries[0]);
	uint32_t room = (part->size - sizeof(*cpuid)) / entry;

	cpuid->nent = room;
	if (ioctl(fd, part->request, cpuid)) {
		/* It does not say how many there are. */
		if (errno == E2BIG && room < MAX_CPUID_ENTRIES)
			return resized(sizeof(*cpuid) + MAX_CPUID_ENTRIES * entry);
		return failed(errno, 0);
	}
	return cpuid->nent == room ? 0 : resized(sizeof(*cpuid) + cpuid->nent * entry);
}

static int64_t get_nested(int fd, const struct hv_part *part, struct kvm_nested_state *nested)
{
	nested->size = part->size;
	if (ioctl(fd, part->request, nested) && errno != E2BIG)
		return failed(errno, 0);
	return nested->size == part->size ? 0 : resized(nested->size);
}

static int64_t get_part(int fd, const struct hv_part *part, uint8_t *to)
{
	int rc;

	switch (part->kind) {
	case HV_PART_VALUE:
		rc = ioctl(fd, part->request, 0);
		if (rc >= 0)
			memcpy(to, &rc, sizeof(rc));
		break;
	case HV_PART_MSRS:
		return do_msrs(fd, part->request, (struct kvm_msrs *)to, 0, (struct kvm_msrs *)to);
	case HV_PART_CPUID:
		return get_cpuid(fd, part, (struct kvm_cpuid2 *)to);
	case HV_PART_NESTED:
		return get_nested(fd, part, (struct kvm_nested_state *)to);
	case HV_PART_CHIP:
		((struct kvm_irqchip *)to)->chip_id = part->argument;
		rc = ioctl(fd, part->request, to);
		break;
	default:
		rc = ioctl(fd, part->request, to);
	}
	return rc < 0 ? failed(errno, 0) : 0;
}

static int64_t put_part(int fd, const struct hv_part *part, const uint8_t *from)
{
	uint32_t value;
	int rc;

	switch (part->kind) {
	case HV_PART_VALUE:
		memcpy(&value, from, sizeof(value));
		rc = ioctl(fd, part->request, (unsigned long)value);
		break;
	case HV_PART_MSRS:
		return do_msrs(fd, part->request, (const struct kvm_msrs *)from, 0, NULL);
	default:
		rc = ioctl(fd, part->request, from);
	}
	return rc < 0 ? failed(errno, 0) : 0;
}

int64_t hv_vm_state_get(int fd, const struct hv_part *parts, uint32_t nr, uint8_t *block)
{
	int64_t rc = 0;

	for (uint32_t at = 0; at < nr && !rc; at++)
		rc = with_part(get_part(fd, &parts[at], block + parts[at].offset), at);
	return rc;
}

/* All that KVM takes: it stops at an MSR that it refuses. */
static void put_back_msrs(int fd, const struct hv_part *part, const struct kvm_msrs *msrs)
{
	int64_t rc;

	for (uint32_t at = 0; at < msrs->nmsrs; at++) {
		rc = do_msrs(fd, part->request, msrs, at, NULL);
		if (!rc)
			return;
		at = (uint32_t)(rc >> HV_STATE_DONE_SHIFT);
	}
}

/* What cannot be put back is for Python to see: it looks at all of it. */
static void put_back(int fd, const struct hv_state_undo *undo)
{
	for (const struct hv_part *part = undo->put; part < undo->put + undo->nr; part++)
		if (part->kind == HV_PART_MSRS)
			put_back_msrs(fd, part,
				      (const struct kvm_msrs *)(undo->block + part->offset));
		else
			put_part(fd, part, undo->block + part->offset);
}

int64_t hv_vm_state_put(int fd, const struct hv_part *parts, uint32_t nr, const uint8_t *block,
			struct hv_state_undo *undo)
{
	int64_t rc = 0;

	if (undo) {
		undo->got = 0;
		rc = hv_vm_state_get(fd, undo->get, undo->nr, undo->block);
		if (rc)
			return rc;
		undo->got = 1;
	}
	for (uint32_t at = 0; at < nr && !rc; at++) {
		rc = with_part(put_part(fd, &parts[at], block + parts[at].offset), at);
		if (rc && undo)
			put_back(fd, undo);
	}
	return rc;
}

int64_t hv_state_get(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr, uint8_t *block)
{
	int64_t rc = hv_claim(v);

	if (rc)
		return rc;
	rc = hv_vm_state_get(v->fd, parts, nr, block);
	hv_unclaim(v);
	return rc;
}

/* Claimed: without an in-kernel APIC every KVM_RUN loads CR8 from the page, and would undo that of
 * SREGS. */
static void keep_cr8(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr,
		     const uint8_t *block)
{
	const uint32_t offset = offsetof(struct kvm_sregs, cr8); /* and of kvm_sregs2 */

	for (uint32_t at = 0; at < nr; at++) {
		uint32_t number = parts[at].request & 0xff;
		uint64_t cr8;

		if (number != 0x84 && number != 0xcd) /* KVM_SET_SREGS, KVM_SET_SREGS2 */
			continue;
		memcpy(&cr8, block + parts[at].offset + offset, sizeof(cr8));
		hv_keep_cr8(v, cr8);
	}
}

int64_t hv_state_put(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr,
		     const uint8_t *block, struct hv_state_undo *undo)
{
	int64_t rc = hv_claim(v);

	if (rc)
		return rc;
	rc = hv_vm_state_put(v->fd, parts, nr, block, undo);
	if (!rc)
		keep_cr8(v, parts, nr, block);
	hv_unclaim(v);
	return rc;
}
