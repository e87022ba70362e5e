/*
 * QEMU's synchronisation of a vCPU's state (hvmodel/state/sync.py): Python takes the state, and
 * from then on until it has put it, it is Python's (hv_vcpu.dirty): no KVM_RUN, no other get or
 * put. Parts, words and blocks are those of state.h.
 */
int64_t hv_sync_get(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr, uint8_t *block);
int64_t hv_sync_put(struct hv_vcpu *v, const struct hv_part *parts, uint32_t nr,
		    const uint8_t *block, uint64_t cr8);
int hv_events_put_calm(int fd, int vm_fd, const struct kvm_vcpu_events *events);
int64_t hv_sync_mark(struct hv_vcpu *v, uint32_t dirty);
