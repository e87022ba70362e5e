/*
 * What Python sees of the run loop (run.c): one struct hv_vcpu per vCPU, entered with hv_run(),
 * interrupted with hv_kick_send(), and with an hv_batch attached, exits served in C until one needs
 * Python.
 *
 * hv_run() answers with one 64-bit word.  A word >= 0 is an exit:
 *
 *   63 62 61               30 29        14 13      12    9 8     7      0
 *  +--+--+-------------------+------------+-------+-------+-----+--------+
 *  |0 |0 | PIO data, 32 bits | port       |complex| size  |write| reason |
 *  +--+--+-------------------+------------+-------+-------+-----+--------+
 *
 * With `complex` clear the word says all there is (a port access of one element, HLT, shutdown,
 * ...), so that equal words are equal exits.  With it set, the rest is in the kvm_run page.  A word
 * in (-4096, 0) is the -errno of KVM_RUN; one at or below HV_CODE_BASE is one of the codes below.
 */
#define HV_WORD_WRITE_SHIFT 8
#define HV_WORD_SIZE_SHIFT  9
#define HV_WORD_COMPLEX	    0x2000
#define HV_WORD_PORT_SHIFT  14
#define HV_WORD_DATA_SHIFT  30

#define HV_CODE_BASE	-5000
#define HV_BUSY		-5001 /* another thread runs this vCPU */
#define HV_CLOSED	-5002 /* closed, or never opened */
#define HV_FORKED	-5003 /* made by the parent of this process */
#define HV_UNANSWERED	-5004 /* a read exit waits for its data */
#define HV_KICKED	-5005 /* hv_kick_send() */
#define HV_SIGNALED	-5006 /* a signal that the process handles came in */
#define HV_TIMEOUT	-5007 /* the deadline has passed */
#define HV_RETRY	-5008 /* nothing of ours: let Python look at its signals and enter again */
#define HV_RING_FULL	-5009 /* a capture ring is full: drain it, enter again */
#define HV_RECORDS_FULL -5010 /* the record buffer is full */
#define HV_LIMIT	-5011 /* max_exits were served */
#define HV_EXITING	-5012 /* the interpreter is exiting: no vCPU is entered any more */
#define HV_NO_TIMER	-5013 /* timer_create(2) was refused */
#define HV_STALE -5014 /* not at hand: it takes a system call, an exit to be finished, a wait */
#define HV_DIRTY -5015 /* Python has the state: it is to be put first (native/sync.h) */

/* What is done with an access, by rule or, where no rule covers it, by default. */
#define HV_STOP	    0 /* give the exit to Python */
#define HV_IGNORE   1 /* drop a write, answer a read with all ones (open bus) */
#define HV_CONSTANT 2 /* answer a read with rule.value; drop a write */
#define HV_CAPTURE  3 /* append a write's bytes to rule.ring */
#define HV_FEED	    4 /* answer a read from rule.ring; where that is empty, do rule.on_empty */

/* One producer, one consumer; head and tail run on, capacity is a power of two and at least 8192.
 */
struct hv_ring {
	uint8_t *data;
	uint64_t capacity;
	uint64_t head; /* bytes ever produced */
	uint64_t tail; /* bytes ever consumed */
};

/* An access is covered when all its bytes lie in [start, end).  Rules are sorted and disjoint. */
struct hv_rule {
	uint64_t start;
	uint64_t end;
	uint32_t read;
	uint32_t write;
	uint32_t on_empty; /* HV_STOP, HV_IGNORE or HV_CONSTANT */
	uint32_t pad;
	uint64_t value;
	struct hv_ring *capture;
	struct hv_ring *feed;
};

/* One exit as it was recorded: 48 bytes. */
struct hv_record {
	uint64_t time_ns; /* CLOCK_MONOTONIC when KVM_RUN returned; 0 without hv_batch.timestamps */
	uint64_t rip;	  /* 0 where the registers are not synced (KVM_CAP_SYNC_REGS) */
	uint64_t address; /* port, gpa or MSR index; 0 for other exits */
	uint64_t data;	  /* first 8 bytes written or answered, little-endian; of an exit left to
			     Python: written only */
	uint32_t reason;  /* KVM_EXIT_* */
	uint32_t count;	  /* elements of a port access, else 1 */
	uint8_t size;	  /* bytes of an element */
	uint8_t is_write;
	uint8_t policy; /* HV_*: what was done with it; HV_STOP: given to Python */
	uint8_t pad[5];
};

#define HV_NR_REASONS 64

struct hv_batch {
	struct hv_rule *pio;
	struct hv_rule *mmio;
	uint32_t nr_pio;
	uint32_t nr_mmio;
	uint32_t unclaimed_pio; /* HV_STOP or HV_IGNORE */
	uint32_t unclaimed_mmio;
	uint64_t max_exits; /* exits served before HV_LIMIT; 0: no limit */
	uint64_t served;    /* of those; HV_RETRY and HV_RING_FULL go on counting */
	struct hv_record *records;
	uint64_t records_capacity;
	uint64_t nr_records;
	uint32_t timestamps;
	uint32_t ring_full; /* a capture ring is to be drained by Python, which then clears this */
	uint64_t nr_exits;  /* all exits, also those given to Python */
	uint64_t nr_served;
	uint64_t counts[HV_NR_REASONS]; /* by exit reason; reasons beyond it count in the last */
};

/* A memslot as exits see it: [start, end) of guest physical addresses. */
struct hv_slot {
	uint64_t start;
	uint64_t end;
	uint32_t readonly;
	uint32_t pad;
};

/* A VM's memslots; its own copy, changed while vCPUs run. */
struct hv_slots {
	struct hv_slot *sorted;
	uint32_t nr;
	uint8_t lock;
	uint8_t pad[3];
};

struct hv_vcpu {
	uint64_t serial; /* another one for every vCPU that was opened; 0: closed */
	int32_t fd;
	uint32_t state;	  /* idle, running or closed */
	int32_t tid;	  /* of the running thread */
	int32_t between;  /* of the one whose run goes on when its Python has looked at something */
	uint32_t kick;	  /* a kick waits to be delivered */
	uint32_t kicks;	  /* kicks delivered: HV_KICKED answers */
	uint32_t acks;	  /* of those, how many Python has seen */
	uint32_t signals; /* signal count up to which this vCPU was interrupted */
	uint32_t generation;
	uint32_t timed_out;
	uint32_t unanswered; /* a read exit waits for its data */
	uint32_t incomplete; /* KVM finishes the last exit's instruction at the next entry */
	uint32_t held;	     /* what the next hv_run() answers first: see HELD_* */
	uint32_t sync;	     /* KVM_SYNC_X86_*: what this KVM takes and gives with KVM_RUN */
	uint32_t fresh;	     /* what of run->s.regs is as KVM has it: see "registers" in run.c */
	uint32_t written;    /* what of it KVM is yet to be given */
	uint32_t dirty;	     /* Python has the vCPU's state, and KVM is yet to be given it */
	uint32_t begun;	     /* ioctls on the vCPU that may change its state: begun ... */
	uint32_t ended;	     /* ... and ended */
	uint32_t seen;	     /* how many had ended of those that `fresh` knows of */
	uint64_t runs;	     /* how often it was run, to whatever end */
	int64_t deadline;    /* CLOCK_MONOTONIC in ns; 0: none */
	struct kvm_run *run;
	uint64_t run_size;
	struct kvm_run *exit; /* the last exit as Python decodes it: its memory outlives close */
	uint64_t exit_size;
	struct hv_batch *batch;
	struct hv_slots *slots; /* its VM's, or NULL */
	struct hv_vcpu *next_free;
};

int hv_vcpu_open(int fd, uint64_t run_size, struct hv_vcpu **out);
int hv_vcpu_close(struct hv_vcpu *v, int64_t timeout_ns);
int64_t hv_run(struct hv_vcpu *v, int64_t timeout_ns);
int64_t hv_run_until(struct hv_vcpu *v, int64_t deadline_ns);
int64_t hv_complete(struct hv_vcpu *v);
int64_t hv_claim(struct hv_vcpu *v);
void hv_unclaim(struct hv_vcpu *v);
int hv_answer(struct hv_vcpu *v, uint64_t value);
int hv_answer_bytes(struct hv_vcpu *v, const uint8_t *data, uint64_t size);
int hv_fail_msr(struct hv_vcpu *v);
int hv_kick_send(struct hv_vcpu *v);
int hv_kick_wait(struct hv_vcpu *v, uint32_t acks, int64_t wait_ns);
void hv_ack_signals(struct hv_vcpu *v);
int hv_chain_signals(void);
void hv_exiting(void);
int64_t hv_monotonic_ns(void);
uint64_t hv_ring_read(struct hv_ring *ring, uint8_t *to, uint64_t size);
uint64_t hv_ring_write(struct hv_ring *ring, const uint8_t *from, uint64_t size);
int hv_set_batch(struct hv_vcpu *v, struct hv_batch *batch);
int hv_batch_update(struct hv_vcpu *v, struct hv_batch *batch, const struct hv_batch *next);
int64_t hv_take_records(struct hv_vcpu *v, struct hv_batch *batch, struct hv_record *to,
			uint64_t room);
int hv_unread(struct hv_vcpu *v);
void hv_run_ends(struct hv_vcpu *v);
int hv_signalled(const struct hv_vcpu *v);
int hv_page_read(struct hv_vcpu *v, uint64_t offset, uint8_t *to, uint64_t size);
int hv_page_write(struct hv_vcpu *v, uint64_t offset, const uint8_t *from, uint64_t size);
int64_t hv_claim_dirty(struct hv_vcpu *v);
int hv_settle(struct hv_vcpu *v);
int hv_begin(struct hv_vcpu *v);
void hv_end(struct hv_vcpu *v);
int hv_reg_read(struct hv_vcpu *v, uint64_t offset, uint64_t *to);
int hv_regs_read(struct hv_vcpu *v, struct kvm_regs *to);
int hv_sregs_read(struct hv_vcpu *v, struct kvm_sregs *to);
int hv_sync_fetch(struct hv_vcpu *v, uint32_t part, uint64_t offset, uint8_t *to, uint64_t size);
int64_t hv_regs_write(struct hv_vcpu *v, uint64_t offset, const uint8_t *from, uint64_t size,
		      uint32_t may_wait);
int64_t hv_sregs_put(struct hv_vcpu *v, const struct kvm_sregs *sregs);
void hv_keep_cr8(struct hv_vcpu *v, uint64_t cr8);
void hv_write_cr8(struct hv_vcpu *v, uint64_t cr8);
int hv_slots_set(struct hv_slots *slots, const struct hv_slot *sorted, uint32_t nr);
void hv_slots_drop(struct hv_slots *slots);
void hv_set_heartbeat(int64_t ns);
