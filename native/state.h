/*
 * The state of a vCPU, or of a VM, in one call: an array of parts, each an ioctl and the place of
 * its bytes in one block of memory.  Python decides which parts and in which order.
 */
#define HV_PART_STRUCT 0 /* the ioctl takes the bytes */
#define HV_PART_VALUE  1 /* 4 bytes: what the get returns and the put takes by value */
#define HV_PART_MSRS   2 /* struct kvm_msrs, of any length; the indices are there before a get */
#define HV_PART_CPUID  3 /* struct kvm_cpuid2 with as many entries as fit */
#define HV_PART_NESTED 4 /* struct kvm_nested_state */
#define HV_PART_CHIP   5 /* struct kvm_irqchip of the chip `argument` */

/*
 * What the calls answer that stop at a part.  Such an answer is a word:
 *
 *   bits 7..0    HV_STATE_FAILED or HV_STATE_RESIZED
 *   bits 15..8   the part, by its number in the array; those before it are done
 *   bits 31..16  errno; 0 where an MSR was refused, for which there is none
 *   bits 62..32  MSRs: how many were done; HV_STATE_RESIZED: the size that the part has
 */
#define HV_STATE_FAILED	     1 /* a part was refused */
#define HV_STATE_RESIZED     2 /* a part is of another size than was thought */
#define HV_STATE_AT_SHIFT    8
#define HV_STATE_ERROR_SHIFT 16
#define HV_STATE_DONE_SHIFT  32

struct hv_part {
	uint64_t request;
	uint32_t kind; /* HV_PART_* */
	uint32_t argument;
	uint32_t offset;
	uint32_t size;
};

/*
 * What is to be put back where a put is refused.  Both tables name the same parts: all that the put
 * may change, which is more than those that it puts (KVM_SET_REGS drops a pending exception, ...).
 */
struct hv_state_undo {
	const struct hv_part *get;
	const struct hv_part *put;
	uint8_t *block; /* their bytes as they were */
	uint32_t nr;
	uint32_t got; /* 0: the failure is one of getting what was before, and nothing was put */
};

/* They stop at the first part that is refused.  0; a word of HV_STATE_*; -errno or HV_* as
 * hv_claim(). */
int64_t hv_state_get(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr, uint8_t *block);
/* `undo` may be NULL; else it is got first, and put back where a part is refused. */
int64_t hv_state_put(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr,
		     const uint8_t *block, struct hv_state_undo *undo);

/* The same of a VM, by its file descriptor. */
int64_t hv_vm_state_get(int fd, const struct hv_part *parts, uint32_t nr, uint8_t *block);
int64_t hv_vm_state_put(int fd, const struct hv_part *parts, uint32_t nr, const uint8_t *block,
			struct hv_state_undo *undo);
