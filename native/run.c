// SPDX-License-Identifier: MIT
/*
 * The run loop: KVM_RUN without races and without a system call per exit.
 *
 * Interruption.  The page of struct kvm_run has one byte, immediate_exit, that makes KVM_RUN return
 * EINTR at once.  Only the running thread writes it, in its own signal handlers, which find the
 * vCPU through `runner` (thread-local).  So a signal that lands between the last check and KVM_RUN
 * is not lost, and nobody touches a kvm_run page that another thread may be unmapping:
 *
 *   runner                                kicker
 *   state = RUNNING, tid, runner.current  kick = 1
 *   -- full barrier --                    -- full barrier --
 *   kick set?  answer HV_KICKED           state RUNNING?  tgkill(tid, kick signal)
 *   KVM_RUN
 *
 * Either the runner sees the kick or the kicker sees the runner; a signal to a thread that has left
 * finds no current vCPU and does nothing, and the kick stays pending for the next run.
 *
 * Signals of the process (Ctrl-C) work in the same way: a handler of ours stands before the one
 * that was installed, runs it first, counts, and then interrupts every running vCPU.  A runner that
 * finds the count ahead of what it has seen does not enter.
 *
 * A handler that Python installs later (signal.signal) drops ours.  So a running vCPU has a
 * heartbeat: ten times a second it is interrupted, puts our handler back, and lets Python look at
 * its signals.
 *
 * Deadlines: the same timer, one per thread, armed only when it is not armed or the deadline is
 * earlier than what it is armed for; its handler re-arms.  A run without a deadline makes no system
 * call but KVM_RUN and reads no clock.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "kvm_uapi.h"
#include "run.h"

/* hv_vcpu.held: a further exit of the same instruction; one that Python could not take. */
enum { HELD_FURTHER = 1, HELD_UNREAD = 2 };

#define KVM_RUN_REQUEST		    _IO(0xAE, 0x80)
#define KVM_GET_REGS_REQUEST	    _IOR(0xAE, 0x81, struct kvm_regs)
#define KVM_SET_REGS_REQUEST	    _IOW(0xAE, 0x82, struct kvm_regs)
#define KVM_GET_SREGS_REQUEST	    _IOR(0xAE, 0x83, struct kvm_sregs)
#define KVM_SET_SREGS_REQUEST	    _IOW(0xAE, 0x84, struct kvm_sregs)
#define KVM_GET_VCPU_EVENTS_REQUEST _IOR(0xAE, 0x9f, struct kvm_vcpu_events)
#define KVM_SET_VCPU_EVENTS_REQUEST _IOW(0xAE, 0xa0, struct kvm_vcpu_events)

/* See native/pyrun.c. */
#define HOT __attribute__((hot))

static int64_t heartbeat_ns = 100000000;

/* BRIEF: somebody looks at the page, and will be done in no time: whoever wants it waits. */
enum { HV_STATE_CLOSED = 0, HV_STATE_IDLE = 1, HV_STATE_RUNNING = 2, HV_STATE_BRIEF = 3 };

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

struct hv_runner {
	struct hv_vcpu *current; /* what this thread runs now */
	pid_t tid;		 /* 0: this thread has never run a vCPU */
	int64_t armed;		 /* when the timer fires; 0: not armed */
	timer_t timer;
	bool has_timer;
	bool beat;	   /* the timer fired before a deadline */
	uint32_t chaining; /* inside on_chained() for these of `chained` */
};

/* initial-exec: a signal handler must not be the one to allocate thread-local storage. */
static __thread struct hv_runner runner __attribute__((tls_model("initial-exec")));

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_key_t timer_key;
static int kick_signal;
static uint64_t nr_opened;
static uint32_t generation; /* bumped in the child of a fork */
static uint32_t exiting;
static pid_t process;

int64_t hv_monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* ---- the pool: a struct hv_vcpu is never given back, so that signal handlers and late kickers may
 * read it ---- */

#define POOL_CHUNK	64
#define POOL_QUARANTINE 512 /* closed ones that wait before the oldest is used again */

struct pool_chunk {
	struct pool_chunk *next;
	struct hv_vcpu vcpus[POOL_CHUNK];
};

static struct pool_chunk *pool;
static struct hv_vcpu *free_oldest, *free_newest;
static uint32_t nr_free;

static struct hv_vcpu *pool_take(void)
{
	struct pool_chunk *chunk;
	struct hv_vcpu *v;

	if (nr_free <= POOL_QUARANTINE) {
		chunk = calloc(1, sizeof(*chunk));
		if (!chunk)
			return NULL;
		for (int i = 0; i < POOL_CHUNK; i++) {
			chunk->vcpus[i].next_free = free_oldest;
			free_oldest = &chunk->vcpus[i];
			if (!free_newest)
				free_newest = free_oldest;
		}
		nr_free += POOL_CHUNK;
		chunk->next = pool;
		__atomic_store_n(&pool, chunk, __ATOMIC_RELEASE);
	}
	v = free_oldest;
	free_oldest = v->next_free;
	if (!free_oldest)
		free_newest = NULL;
	nr_free--;
	return v;
}

static void pool_give(struct hv_vcpu *v)
{
	v->next_free = NULL;
	if (free_newest)
		free_newest->next_free = v;
	else
		free_oldest = v;
	free_newest = v;
	nr_free++;
}

/* ---- signals ---- */

static void signal_runner(struct hv_vcpu *v)
{
	pid_t tid = __atomic_load_n(&v->tid, __ATOMIC_SEQ_CST);

	/* The thread may have ended, or its number be another thread's now: the handler there does
	 * nothing. */
	if (tid)
		syscall(SYS_tgkill, process, tid, kick_signal);
}

static void arm_timer(int64_t deadline)
{
	struct itimerspec at = {
		.it_value = {.tv_sec = deadline / 1000000000, .tv_nsec = deadline % 1000000000},
	};

	/* Before the call: its handler, which says that it fired, may have run when that returns.
	 */
	runner.armed = deadline;
	if (timer_settime(runner.timer, TIMER_ABSTIME, &at, NULL))
		runner.armed = 0;
}

static int64_t next_beat(int64_t now, int64_t deadline)
{
	int64_t beat = now + heartbeat_ns;

	return deadline && deadline < beat ? deadline : beat;
}

static void on_kick(int signal, siginfo_t *info, void *context)
{
	struct hv_vcpu *v = runner.current;
	int saved = errno;

	(void)signal;
	(void)context;
	if (info->si_code == SI_TIMER)
		runner.armed = 0;
	if (v && info->si_code == SI_TIMER) {
		int64_t now = hv_monotonic_ns();

		if (v->deadline && now >= v->deadline)
			v->timed_out = 1;
		else
			arm_timer(next_beat(now, v->deadline));
		runner.beat = true;
	}
	if (v)
		v->run->immediate_exit = 1;
	errno = saved;
}

/* The signals by which people and programs stop a process.  Those without a handler are left alone.
 */
static const int chained[] = {SIGINT, SIGTERM, SIGHUP, SIGALRM, SIGUSR1, SIGUSR2};
#define NR_CHAINED (sizeof(chained) / sizeof(chained[0]))
static struct sigaction behind[NR_CHAINED];
static struct sigaction further[NR_CHAINED]; /* behind us when `behind` was put before us */
static uint32_t nr_signals;

static void call_handler(const struct sigaction *action, int signal, siginfo_t *info, void *context)
{
	if (action->sa_flags & SA_SIGINFO)
		action->sa_sigaction(signal, info, context);
	else if (action->sa_handler != SIG_DFL && action->sa_handler != SIG_IGN)
		action->sa_handler(signal);
}

static void on_chained(int signal, siginfo_t *info, void *context)
{
	int saved = errno;
	size_t i = 0;
	pid_t tid;

	while (i < NR_CHAINED - 1 && chained[i] != signal)
		i++;
	if (runner.chaining & 1u << i) {
		/* The handler behind us passes the signal on to the one before it: us. */
		call_handler(&further[i], signal, info, context);
		return;
	}
	runner.chaining |= 1u << i;
	call_handler(&behind[i], signal, info, context);
	/* After the handler: whoever sees the new count may rely on Python's own flag being set. */
	__atomic_fetch_add(&nr_signals, 1, __ATOMIC_SEQ_CST);
	if (runner.current)
		runner.current->run->immediate_exit = 1;
	tid = (pid_t)syscall(SYS_gettid);
	for (struct pool_chunk *c = __atomic_load_n(&pool, __ATOMIC_ACQUIRE); c; c = c->next)
		for (int at = 0; at < POOL_CHUNK; at++) {
			struct hv_vcpu *v = &c->vcpus[at];

			if (__atomic_load_n(&v->state, __ATOMIC_SEQ_CST) == HV_STATE_RUNNING &&
			    __atomic_load_n(&v->tid, __ATOMIC_SEQ_CST) != tid)
				signal_runner(v);
		}
	runner.chaining &= ~(1u << i);
	errno = saved;
}

static int chain_signal(size_t i)
{
	struct sigaction now, ours, old;

	if (sigaction(chained[i], NULL, &now))
		return -errno;
	if (now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN ||
	    now.sa_sigaction == on_chained)
		return 0;
	ours = now;
	ours.sa_flags |= SA_SIGINFO;
	ours.sa_sigaction = on_chained;
	if (behind[i].sa_sigaction && behind[i].sa_sigaction != now.sa_sigaction)
		further[i] = behind[i];
	behind[i] = now;
	if (sigaction(chained[i], &ours, &old))
		return -errno;
	/* The main thread has put another in between: that one holds. */
	if (old.sa_sigaction != now.sa_sigaction)
		return sigaction(chained[i], &old, NULL) ? -errno : 0;
	return 0;
}

/* Put our handler before those installed since the last call.  0 or -errno. */
int hv_chain_signals(void)
{
	int rc = 0;

	pthread_mutex_lock(&lock);
	for (size_t i = 0; i < NR_CHAINED && !rc; i++)
		rc = chain_signal(i);
	pthread_mutex_unlock(&lock);
	return rc;
}

static void delete_timer(void *unused)
{
	(void)unused;
	if (runner.has_timer) {
		timer_delete(runner.timer);
		runner.has_timer = false;
		runner.armed = 0;
	}
}

/* So that the child finds the pool whole. */
static void before_fork(void)
{
	pthread_mutex_lock(&lock);
}

static void after_fork_in_parent(void)
{
	pthread_mutex_unlock(&lock);
}

static void after_fork_in_child(void)
{
	generation++;
	process = getpid();
	/* Timers are not inherited, threads neither; what the parent runs is not running here. */
	memset(&runner, 0, sizeof(runner));
	pthread_mutex_init(&lock, NULL);
	for (struct pool_chunk *c = pool; c; c = c->next)
		for (int i = 0; i < POOL_CHUNK; i++) {
			c->vcpus[i].between = 0;
			if (c->vcpus[i].state != HV_STATE_CLOSED)
				c->vcpus[i].state = HV_STATE_IDLE;
		}
}

/* Called with the lock held, once. */
static int start(void)
{
	struct sigaction kick = {.sa_sigaction = on_kick, .sa_flags = SA_SIGINFO | SA_RESTART};
	struct sigaction now;
	int signal;

	/* A real-time signal that nobody uses: of two pending kicks neither is dropped, and no one
	 * else sends it. */
	for (signal = SIGRTMAX - 1; signal > SIGRTMIN; signal--)
		if (!sigaction(signal, NULL, &now) && now.sa_handler == SIG_DFL)
			break;
	if (signal <= SIGRTMIN)
		return -EBUSY;
	if (sigaction(signal, &kick, NULL))
		return -errno;
	if (pthread_key_create(&timer_key, delete_timer))
		return -EAGAIN;
	if (pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child))
		return -ENOMEM;
	process = getpid();
	__atomic_store_n(&kick_signal, signal, __ATOMIC_RELEASE);
	return 0;
}

/* The time between heartbeats, 100 ms unless set: tests set it out of the way, or it would hide
 * what it mends. */
void hv_set_heartbeat(int64_t ns)
{
	heartbeat_ns = ns;
}

/* From now on hv_run() answers HV_EXITING; running vCPUs are interrupted. */
void hv_exiting(void)
{
	__atomic_store_n(&exiting, 1, __ATOMIC_SEQ_CST);
	for (struct pool_chunk *c = __atomic_load_n(&pool, __ATOMIC_ACQUIRE); c; c = c->next)
		for (int i = 0; i < POOL_CHUNK; i++)
			if (__atomic_load_n(&c->vcpus[i].state, __ATOMIC_SEQ_CST) ==
			    HV_STATE_RUNNING)
				hv_kick_send(&c->vcpus[i]);
}

/* Before a thread's first run. */
static int start_thread(void)
{
	sigset_t kick;

	sigemptyset(&kick);
	sigaddset(&kick, kick_signal);
	if (pthread_sigmask(SIG_UNBLOCK, &kick, NULL))
		return -EINVAL;
	runner.tid = (pid_t)syscall(SYS_gettid);
	return 0;
}

static int start_timer(void)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = kick_signal};

	event.sigev_notify_thread_id = runner.tid;
	if (timer_create(CLOCK_MONOTONIC, &event, &runner.timer))
		return HV_NO_TIMER;
	runner.has_timer = true;
	/* The value only has to be non-NULL for the destructor to be called when the thread ends.
	 */
	pthread_setspecific(timer_key, &runner);
	return 0;
}

/* ---- life ---- */

/* Map the kvm_run page of vCPU `fd` and make *out runnable.  0 or -errno. */
int hv_vcpu_open(int fd, uint64_t run_size, struct hv_vcpu **out)
{
	struct kvm_run *exit = NULL;
	struct hv_vcpu *v = NULL;
	void *run;
	int rc = hv_chain_signals();

	if (rc)
		return rc;
	run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (run == MAP_FAILED)
		return -errno;
	pthread_mutex_lock(&lock);
	if (!kick_signal)
		rc = start();
	if (!rc) {
		v = pool_take();
		rc = v ? 0 : -ENOMEM;
	}
	if (v) {
		/* Kept for the next vCPU in this place; never smaller, for the size is the
		 * kernel's. */
		exit = v->exit && v->exit_size >= run_size ? v->exit : calloc(1, run_size);
		if (!exit) {
			pool_give(v);
			rc = -ENOMEM;
		}
	}
	pthread_mutex_unlock(&lock);
	if (rc) {
		munmap(run, run_size);
		return rc;
	}
	memset(v, 0, sizeof(*v));
	v->exit = exit;
	v->exit_size = run_size;
	v->serial = __atomic_add_fetch(&nr_opened, 1, __ATOMIC_SEQ_CST);
	v->fd = fd;
	v->run = run;
	v->run_size = run_size;
	v->generation = generation;
	v->signals = __atomic_load_n(&nr_signals, __ATOMIC_SEQ_CST);
	__atomic_store_n(&v->state, HV_STATE_IDLE, __ATOMIC_SEQ_CST);
	*out = v;
	return 0;
}

/* Stop the runner if there is one, and unmap the kvm_run page.  0, or -EBUSY if it did not leave in
 * time. */
int hv_vcpu_close(struct hv_vcpu *v, int64_t timeout_ns)
{
	struct timespec nap = {.tv_nsec = 20000};
	int64_t until = hv_monotonic_ns() + timeout_ns;
	uint32_t idle = HV_STATE_IDLE;

	while (!__atomic_compare_exchange_n(&v->state, &idle, HV_STATE_CLOSED, false,
					    __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
		if (idle == HV_STATE_CLOSED)
			return 0;
		if (hv_monotonic_ns() > until)
			return -EBUSY;
		hv_kick_send(v);
		nanosleep(&nap, NULL);
		idle = HV_STATE_IDLE;
	}
	munmap(v->run, v->run_size);
	v->run = NULL;
	v->serial = 0;
	v->batch = NULL;
	__atomic_fetch_add(&v->acks, 1, __ATOMIC_SEQ_CST);
	pthread_mutex_lock(&lock);
	pool_give(v);
	pthread_mutex_unlock(&lock);
	return 0;
}

/* ---- kick ---- */

#define KICK_SPIN_NS 200000

/*
 * Make the running or next hv_run() answer HV_KICKED, once.  1: a runner was signalled; 0: the vCPU
 * is not running, and its next run will see the kick.  Short: one system call, for callers that
 * hold the GIL.
 */
int hv_kick_send(struct hv_vcpu *v)
{
	__atomic_store_n(&v->kick, 1, __ATOMIC_SEQ_CST);
	if (__atomic_load_n(&v->state, __ATOMIC_SEQ_CST) != HV_STATE_RUNNING)
		return 0;
	signal_runner(v);
	return 1;
}

/*
 * Wait up to wait_ns, without the GIL, until the runner's Python code has taken note of the kick
 * (by storing kicks in acks, with the GIL held): a kicker that goes on computing would win the GIL
 * before the runner gets it.  `acks` is what hv_vcpu.acks was before the kick was sent.  1: the
 * runner knows; 0: not yet, or it left with an exit of its own and the kick waits for the next run.
 */
int hv_kick_wait(struct hv_vcpu *v, uint32_t acks, int64_t wait_ns)
{
	struct timespec nap = {.tv_nsec = 50000};
	int64_t begin = hv_monotonic_ns(), now;

	for (now = begin; now - begin < wait_ns; now = hv_monotonic_ns()) {
		if (__atomic_load_n(&v->acks, __ATOMIC_SEQ_CST) != acks)
			return 1;
		if (__atomic_load_n(&v->state, __ATOMIC_SEQ_CST) != HV_STATE_RUNNING &&
		    __atomic_load_n(&v->kick, __ATOMIC_SEQ_CST))
			return 0;
		if (now - begin < KICK_SPIN_NS)
			sched_yield();
		else
			nanosleep(&nap, NULL);
	}
	return 0;
}

/* The main thread, holding the GIL: signals up to now are Python's business, not the next run's. */
void hv_ack_signals(struct hv_vcpu *v)
{
	v->signals = __atomic_load_n(&nr_signals, __ATOMIC_SEQ_CST);
}

/* ---- rings ---- */

static uint64_t min64(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

/* Append up to `size` bytes; how many. */
uint64_t hv_ring_write(struct hv_ring *ring, const uint8_t *from, uint64_t size)
{
	uint64_t head = ring->head;
	uint64_t room = ring->capacity - (head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE));
	uint64_t at = head & (ring->capacity - 1);
	uint64_t first;

	size = min64(size, room);
	first = min64(size, ring->capacity - at);
	memcpy(ring->data + at, from, first);
	memcpy(ring->data, from + first, size - first);
	__atomic_store_n(&ring->head, head + size, __ATOMIC_RELEASE);
	return size;
}

/* Take up to `size` bytes; how many. */
uint64_t hv_ring_read(struct hv_ring *ring, uint8_t *to, uint64_t size)
{
	uint64_t tail = ring->tail;
	uint64_t at = tail & (ring->capacity - 1);
	uint64_t first;

	size = min64(size, __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) - tail);
	first = min64(size, ring->capacity - at);
	memcpy(to, ring->data + at, first);
	memcpy(to + first, ring->data, size - first);
	__atomic_store_n(&ring->tail, tail + size, __ATOMIC_RELEASE);
	return size;
}

static uint64_t ring_room(const struct hv_ring *ring)
{
	return ring->capacity - (ring->head - __atomic_load_n(&ring->tail, __ATOMIC_ACQUIRE));
}

/* ---- serving exits in C ---- */

/* One port or memory access, however KVM reports it. */
struct access {
	uint64_t address;
	uint8_t *data; /* in the kvm_run page */
	uint64_t bytes;
	uint32_t size;
	uint32_t count;
	bool is_write;
};

/* For an access that lies in a rule in part, so that Python can split it. */
static struct hv_rule stop_rule = {.read = HV_STOP, .write = HV_STOP};

static struct hv_rule *find_rule(struct hv_rule *rules, uint32_t nr, uint64_t address,
				 uint32_t size)
{
	uint32_t low = 0, high = nr;

	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		struct hv_rule *rule = &rules[middle];

		if (address < rule->start)
			high = middle;
		else if (address >= rule->end)
			low = middle + 1;
		else
			return size <= rule->end - address ? rule : &stop_rule;
	}
	return low < nr && rules[low].start - address < size ? &stop_rule : NULL;
}

static void fill(struct access *a, uint64_t value)
{
	for (uint32_t i = 0; i < a->count; i++)
		memcpy(a->data + (uint64_t)i * a->size, &value, a->size);
}

#define MAX_EXIT_BYTES 4096 /* the PIO page: what one exit can carry */

/* What is done with the access: an HV_* policy, HV_STOP for Python; *full when a ring cannot take
 * another. */
static uint32_t serve_access(struct access *a, struct hv_rule *rule, uint32_t unclaimed, bool *full)
{
	uint32_t policy = !rule ? unclaimed : a->is_write ? rule->write : rule->read;

	if (policy == HV_FEED) {
		struct hv_ring *ring = rule->feed;

		if (ring &&
		    __atomic_load_n(&ring->head, __ATOMIC_ACQUIRE) - ring->tail >= a->bytes) {
			hv_ring_read(ring, a->data, a->bytes);
			return HV_FEED;
		}
		policy = rule->on_empty;
	}
	switch (policy) {
	case HV_IGNORE:
		if (!a->is_write)
			memset(a->data, 0xff, a->bytes);
		return HV_IGNORE;
	case HV_CONSTANT:
		if (!a->is_write)
			fill(a, rule->value);
		return HV_CONSTANT;
	case HV_CAPTURE:
		if (!a->is_write || ring_room(rule->capture) < a->bytes)
			return HV_STOP;
		hv_ring_write(rule->capture, a->data, a->bytes);
		*full = ring_room(rule->capture) < MAX_EXIT_BYTES;
		return HV_CAPTURE;
	default:
		return HV_STOP;
	}
}

/* ---- memslots, as far as exits are concerned ---- */

static void lock_slots(struct hv_slots *slots)
{
	while (__atomic_test_and_set(&slots->lock, __ATOMIC_ACQUIRE))
		sched_yield();
}

/* Replace the table by `nr` slots, sorted and disjoint.  0 or -ENOMEM. */
int hv_slots_set(struct hv_slots *slots, const struct hv_slot *sorted, uint32_t nr)
{
	struct hv_slot *copy = malloc((nr ? nr : 1) * sizeof(*copy));
	struct hv_slot *old;

	if (!copy)
		return -ENOMEM;
	memcpy(copy, sorted, nr * sizeof(*copy));
	lock_slots(slots);
	old = slots->sorted;
	slots->sorted = copy;
	slots->nr = nr;
	__atomic_clear(&slots->lock, __ATOMIC_RELEASE);
	free(old);
	return 0;
}

void hv_slots_drop(struct hv_slots *slots)
{
	free(slots->sorted);
	slots->sorted = NULL;
	slots->nr = 0;
}

/*
 * An MMIO exit inside a memslot says that the host page could not be accessed, unless it is a write
 * to a read-only slot: no rule may serve it.
 */
static bool is_host_fault(struct hv_slots *slots, uint64_t gpa, bool is_write)
{
	uint32_t low = 0, high;
	bool fault = false;

	if (!slots)
		return false;
	lock_slots(slots);
	high = slots->nr;
	while (low < high) {
		uint32_t middle = low + (high - low) / 2;
		const struct hv_slot *slot = &slots->sorted[middle];

		if (gpa < slot->start) {
			high = middle;
		} else if (gpa >= slot->end) {
			low = middle + 1;
		} else {
			fault = !is_write || !slot->readonly;
			break;
		}
	}
	__atomic_clear(&slots->lock, __ATOMIC_RELEASE);
	return fault;
}

static bool get_access(struct hv_vcpu *v, struct access *a)
{
	struct kvm_run *run = v->run;

	if (run->exit_reason == KVM_EXIT_IO) {
		a->address = run->io.port;
		a->size = run->io.size;
		a->count = run->io.count;
		a->bytes = (uint64_t)a->size * a->count;
		a->is_write = run->io.direction == KVM_EXIT_IO_OUT;
		a->data = (uint8_t *)run + run->io.data_offset;
		return run->io.data_offset <= v->run_size &&
		       a->bytes <= v->run_size - run->io.data_offset;
	}
	if (run->exit_reason == KVM_EXIT_MMIO) {
		a->address = run->mmio.phys_addr;
		a->size = run->mmio.len;
		a->count = 1;
		a->bytes = a->size;
		a->is_write = run->mmio.is_write;
		a->data = run->mmio.data;
		return a->size <= sizeof(run->mmio.data);
	}
	return false;
}

static uint64_t first_bytes(const struct access *a)
{
	uint64_t value = 0;

	memcpy(&value, a->data, a->bytes < 8 ? a->bytes : 8);
	return value;
}

static void record(struct hv_vcpu *v, struct hv_batch *b, const struct access *a, uint32_t policy)
{
	struct kvm_run *run = v->run;
	struct hv_record *r = &b->records[b->nr_records++];

	*r = (struct hv_record){.reason = run->exit_reason, .count = 1, .policy = (uint8_t)policy};
	if (b->timestamps)
		r->time_ns = (uint64_t)hv_monotonic_ns();
	if (run->kvm_valid_regs & KVM_SYNC_X86_REGS)
		r->rip = run->s.regs.regs.rip;
	if (a) {
		r->address = a->address;
		r->count = a->count;
		r->size = (uint8_t)a->size;
		r->is_write = a->is_write;
		if (a->is_write || policy != HV_STOP)
			r->data = first_bytes(a);
	} else if (run->exit_reason == KVM_EXIT_X86_RDMSR ||
		   run->exit_reason == KVM_EXIT_X86_WRMSR) {
		r->address = run->msr.index;
		r->size = 8;
		r->is_write = run->exit_reason == KVM_EXIT_X86_WRMSR;
		if (r->is_write)
			r->data = run->msr.data;
	}
}

/* 0: served, enter again; 1: Python's; else an HV_* code, the exit being served. */
static int64_t serve(struct hv_vcpu *v, struct hv_batch *b)
{
	struct kvm_run *run = v->run;
	uint32_t reason = run->exit_reason;
	uint32_t policy = HV_STOP;
	struct access access;
	bool has_access = get_access(v, &access);
	bool full = false;

	b->nr_exits++;
	b->counts[reason < HV_NR_REASONS ? reason : HV_NR_REASONS - 1]++;
	if (has_access) {
		if (reason == KVM_EXIT_IO)
			policy = serve_access(
				&access, find_rule(b->pio, b->nr_pio, access.address, access.size),
				b->unclaimed_pio, &full);
		else if (!is_host_fault(v->slots, access.address, access.is_write))
			policy = serve_access(
				&access,
				find_rule(b->mmio, b->nr_mmio, access.address, access.size),
				b->unclaimed_mmio, &full);
	}
	if (b->records)
		record(v, b, has_access ? &access : NULL, policy);
	if (policy == HV_STOP)
		return 1;
	b->nr_served++;
	b->served++;
	if (full) {
		b->ring_full = 1;
		return HV_RING_FULL;
	}
	if (b->records && b->nr_records >= b->records_capacity)
		return HV_RECORDS_FULL;
	return b->served == b->max_exits ? HV_LIMIT : 0;
}

/* ---- whose vCPU it is ---- */

#define BRIEF_WAIT_NS 1000000000

HOT static void release(struct hv_vcpu *v)
{
	__atomic_store_n(&v->state, HV_STATE_IDLE, __ATOMIC_SEQ_CST);
}

/* A plain store: whoever waits for this looks again by itself. */
HOT static void release_briefly(struct hv_vcpu *v)
{
	__atomic_store_n(&v->state, HV_STATE_IDLE, __ATOMIC_RELEASE);
}

/*
 * From idle to `state`, by one thread.  0; HV_CLOSED; HV_BUSY: another thread runs it, or is in a
 * run that goes on, though the vCPU is idle at the moment; HV_STALE: without `may_wait`, and
 * somebody looks at the page.
 */
HOT static int64_t acquire_as(struct hv_vcpu *v, uint32_t state, bool may_wait)
{
	uint32_t idle = HV_STATE_IDLE;
	int64_t begin = 0;
	int32_t between;

	while (!__atomic_compare_exchange_n(&v->state, &idle, state, false, __ATOMIC_SEQ_CST,
					    __ATOMIC_SEQ_CST)) {
		if (idle != HV_STATE_BRIEF)
			return idle == HV_STATE_CLOSED ? HV_CLOSED : HV_BUSY;
		if (!may_wait)
			return HV_STALE;
		if (!begin)
			begin = hv_monotonic_ns();
		else if (hv_monotonic_ns() - begin > BRIEF_WAIT_NS)
			return HV_BUSY;
		sched_yield();
		idle = HV_STATE_IDLE;
	}
	between = __atomic_load_n(&v->between, __ATOMIC_SEQ_CST);
	if (between && between != runner.tid) {
		release(v);
		return HV_BUSY;
	}
	return 0;
}

HOT static int64_t acquire(struct hv_vcpu *v)
{
	return acquire_as(v, HV_STATE_RUNNING, true);
}

/* Not for a child of fork(2): the page is its parent's. */
HOT static int64_t acquire_briefly(struct hv_vcpu *v, bool may_wait)
{
	if (v->generation != generation)
		return v->state == HV_STATE_CLOSED ? HV_CLOSED : HV_FORKED;
	return acquire_as(v, HV_STATE_BRIEF, may_wait);
}

/*
 * ---- registers ----
 *
 * KVM_RUN leaves the registers in the page (run->s.regs) when it returns, as kvm_valid_regs asks,
 * and takes them from there when it begins, as kvm_dirty_regs says.  So they are read and written
 * there, without a system call, as long as the page is what KVM has:
 *
 *   fresh    KVM_SYNC_X86_REGS and _SREGS: that part of the page equals KVM's state.
 *            FRESH_RAN: moreover KVM_RUN has come as far as an exit, and nothing has changed the
 *            vCPU since.  Only then is it known that the next KVM_RUN takes what is dirty: that of
 *            a vCPU which waits for its SIPI does not, and puts KVM's registers over it.
 *            FRESH_CALM: no exception is pending, but see is_calm().  KVM drops one when it takes
 *            registers, in whatever way; so they are then put at once, and the exception again.
 *   written  KVM_SYNC_X86_REGS: the page is newer than KVM's state.
 *
 * What changes the state otherwise is an ioctl on the vCPU's fd, perhaps of another thread, which
 * KVM may hold up until KVM_RUN has returned.  It stands between hv_begin() and hv_end(), which
 * count, and the first gives KVM what is written.  Whoever runs the vCPU notes how many had ended
 * when KVM was asked.  What is fresh counts as long as no more than those have begun: none was
 * under way, and none has come since.
 *
 *   runner            another thread             whoever looks
 *   seen = ended      begun++, settle
 *   KVM_RUN           ioctl
 *   fresh = ...       ended++                    begun != seen?  nothing is fresh
 *
 * An fd that was handed out counts as an ioctl that never ends.  `fresh` and `seen` are written by
 * who has acquired the vCPU.
 */
#define SYNCED	   (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS)
#define FRESH_RAN  0x100
#define FRESH_CALM 0x200

#define RFLAGS_OFFSET offsetof(struct kvm_regs, rflags)
#define RFLAGS_FIXED  0x2
#define RFLAGS_TF     0x100
/* CF PF AF ZF SF IF DF OF IOPL NT: in every mode KVM keeps these as they are set. */
#define RFLAGS_PLAIN 0x7ed5

/* Acquired.  `seen`: what `ended` was before KVM was asked. */
static void set_fresh(struct hv_vcpu *v, uint32_t seen, uint32_t fresh)
{
	v->seen = seen;
	v->fresh = fresh;
}

/* Acquired. */
static uint32_t get_fresh(const struct hv_vcpu *v)
{
	return __atomic_load_n(&v->begun, __ATOMIC_SEQ_CST) == v->seen ? v->fresh : 0;
}

/* Acquired: give KVM what is written.  0 or -errno, and then it is written still. */
static int put_written(struct hv_vcpu *v)
{
	if (!v->written)
		return 0;
	if (ioctl(v->fd, KVM_SET_REGS_REQUEST, &v->run->s.regs.regs))
		return -errno;
	v->run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_REGS;
	__atomic_store_n(&v->written, 0, __ATOMIC_SEQ_CST);
	return 0;
}

/* Acquired: the ioctl itself, with the registers before and after it.  0 or -errno. */
HOT static int kvm_run(struct hv_vcpu *v)
{
	uint32_t seen = __atomic_load_n(&v->ended, __ATOMIC_SEQ_CST);
	uint32_t before = get_fresh(v), after = 0;
	struct kvm_run *run = v->run;
	int rc;

	if (v->written) {
		uint64_t asked = run->kvm_valid_regs | run->kvm_dirty_regs;

		if (before & FRESH_RAN && v->sync & KVM_SYNC_X86_REGS &&
		    !(asked & ~(uint64_t)v->sync))
			run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
		else if ((rc = put_written(v)))
			return rc;
	}
	/* KVM sets the bit of a pending interrupt there and clears no other, and it leaves padding
	 * alone (linux:arch/x86/kvm/x86.c __get_sregs@v6.18). */
	if (run->kvm_valid_regs & ~run->kvm_dirty_regs & KVM_SYNC_X86_SREGS) {
		struct kvm_sregs *sregs = &run->s.regs.sregs;

		if (before & KVM_SYNC_X86_SREGS)
			memset(sregs->interrupt_bitmap, 0, sizeof(sregs->interrupt_bitmap));
		else
			memset(sregs, 0, sizeof(*sregs));
	}
	rc = ioctl(v->fd, KVM_RUN_REQUEST, 0) ? -errno : 0;
	if (!rc || (rc == -EINTR && before & FRESH_RAN))
		after = ((uint32_t)run->kvm_valid_regs & SYNCED) | FRESH_RAN;
	/* An interruption may come between an exception and its delivery. */
	if (!rc)
		after |= FRESH_CALM;
	if (v->written && !(run->kvm_dirty_regs & KVM_SYNC_X86_REGS))
		__atomic_store_n(&v->written, 0, __ATOMIC_SEQ_CST);
	set_fresh(v, seen, after);
	return rc;
}

/* ---- running ---- */

/*
 * Copy the exit for Python, which decodes it when the vCPU no longer counts as running: another
 * thread may close it meanwhile, and unmap the kvm_run page.
 */
HOT static void keep_exit(struct hv_vcpu *v)
{
	struct access access;

	memcpy(v->exit, v->run, offsetof(struct kvm_run, kvm_valid_regs));
	if (v->run->exit_reason == KVM_EXIT_IO && get_access(v, &access))
		memcpy((uint8_t *)v->exit + v->run->io.data_offset, access.data, access.bytes);
}

/* The exit in the kvm_run page as a word; notes what the next entry will have to finish. */
HOT static int64_t exit_word(struct hv_vcpu *v)
{
	struct kvm_run *run = v->run;
	int64_t word = run->exit_reason;

	switch (run->exit_reason) {
	case KVM_EXIT_IO: {
		uint32_t data = 0;

		v->incomplete = 1;
		v->unanswered = run->io.direction == KVM_EXIT_IO_IN;
		word |= (int64_t)run->io.direction << HV_WORD_WRITE_SHIFT;
		word |= (int64_t)run->io.size << HV_WORD_SIZE_SHIFT;
		if (run->io.count != 1 || run->io.size > 4)
			return word | HV_WORD_COMPLEX;
		if (run->io.direction == KVM_EXIT_IO_OUT)
			memcpy(&data, (uint8_t *)run + run->io.data_offset, run->io.size);
		return word | (int64_t)run->io.port << HV_WORD_PORT_SHIFT |
		       (int64_t)data << HV_WORD_DATA_SHIFT;
	}
	case KVM_EXIT_MMIO:
		v->incomplete = 1;
		v->unanswered = !run->mmio.is_write;
		return word | HV_WORD_COMPLEX;
	case KVM_EXIT_X86_RDMSR:
		v->incomplete = 1;
		v->unanswered = 1;
		return word | HV_WORD_COMPLEX;
	case KVM_EXIT_HYPERCALL:
	case KVM_EXIT_X86_WRMSR:
	case KVM_EXIT_XEN:
	case KVM_EXIT_HYPERV:
		v->incomplete = 1;
		return word | HV_WORD_COMPLEX;
	case KVM_EXIT_HLT:
	case KVM_EXIT_SHUTDOWN:
	case KVM_EXIT_IRQ_WINDOW_OPEN:
		return word;
	default:
		return word | HV_WORD_COMPLEX;
	}
}

HOT static int64_t pack_exit(struct hv_vcpu *v)
{
	int64_t word = exit_word(v);

	if ((word & HV_WORD_COMPLEX) || v->unanswered)
		keep_exit(v);
	return word;
}

/* Why KVM_RUN answered EINTR, or why it was not entered; 0: no reason. */
HOT static int64_t interruption(struct hv_vcpu *v)
{
	uint32_t signals = __atomic_load_n(&nr_signals, __ATOMIC_SEQ_CST);

	if (__atomic_load_n(&v->kick, __ATOMIC_SEQ_CST)) {
		__atomic_store_n(&v->kick, 0, __ATOMIC_SEQ_CST);
		v->kicks++;
		return __atomic_load_n(&exiting, __ATOMIC_SEQ_CST) ? HV_EXITING : HV_KICKED;
	}
	if (signals != v->signals) {
		v->signals = signals;
		return HV_SIGNALED;
	}
	if (v->timed_out)
		return HV_TIMEOUT;
	return 0;
}

/* The exit at hand to the batch, if there is one.  An exit word for Python; an HV_* code; 0: enter
 * again. */
HOT static int64_t take_exit(struct hv_vcpu *v)
{
	int64_t code = 1;

	v->unanswered = 0;
	if (v->batch)
		code = serve(v, v->batch);
	if (code == 1)
		return pack_exit(v);
	v->incomplete = 1;
	return code;
}

HOT static int64_t enter(struct hv_vcpu *v)
{
	struct hv_batch *b = v->batch;
	int64_t word;

	if (v->held == HELD_UNREAD) {
		v->held = 0;
		return pack_exit(v);
	}
	if (b && b->ring_full)
		return HV_RING_FULL;
	if (b && b->records && b->nr_records >= b->records_capacity)
		return HV_RECORDS_FULL;
	/* The exit that filled a ring was the last one. */
	if (b && b->max_exits && b->served >= b->max_exits)
		return HV_LIMIT;
	for (;;) {
		if (v->held) {
			v->held = 0;
		} else if ((word = kvm_run(v))) {
			if (word != -EINTR && word != -EAGAIN) {
				keep_exit(v);
				v->run->exit_reason = KVM_EXIT_UNKNOWN;
				return word;
			}
			v->incomplete = 0;
			if (word == -EAGAIN)
				return word;
			word = interruption(v);
			if (runner.beat) {
				runner.beat = false;
				hv_chain_signals();
			}
			/* Else the heartbeat, or a signal that is not chained. */
			return word ? word : HV_RETRY;
		}
		v->incomplete = 0;
		word = take_exit(v);
		if (word)
			return word;
	}
}

HOT static int64_t run_acquired(struct hv_vcpu *v, int64_t deadline)
{
	int64_t word;

	if (v->generation != generation)
		return HV_FORKED;
	if (__atomic_load_n(&exiting, __ATOMIC_RELAXED))
		return HV_EXITING;
	if (v->unanswered)
		return HV_UNANSWERED;
	if (v->dirty)
		return HV_DIRTY;
	if (!runner.tid) {
		word = start_thread();
		if (word)
			return word;
	}
	if (!runner.has_timer) {
		word = start_timer();
		if (word)
			return word;
	}
	v->runs++;
	v->timed_out = 0;
	v->deadline = deadline;
	__atomic_store_n(&v->tid, runner.tid, __ATOMIC_SEQ_CST);
	runner.current = v;
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	/* Only now: a timer that fires earlier finds no vCPU to interrupt. */
	if (!runner.armed)
		arm_timer(next_beat(hv_monotonic_ns(), deadline));
	else if (deadline && runner.armed > deadline)
		arm_timer(deadline);
	word = interruption(v);
	if (!word)
		word = enter(v);
	runner.current = NULL;
	__atomic_signal_fence(__ATOMIC_SEQ_CST);
	v->run->immediate_exit = 0;
	if (v->batch && word != HV_RETRY && word != HV_RING_FULL)
		v->batch->served = 0;
	return word;
}

/*
 * Run vCPU `v` until an exit that Python must see, or an interruption, or CLOCK_MONOTONIC reaches
 * deadline_ns (0: none).  An exit word, -errno of KVM_RUN, or an HV_* code.
 */
HOT int64_t hv_run_until(struct hv_vcpu *v, int64_t deadline_ns)
{
	int64_t word = acquire(v);

	/* At exit a vCPU may be closed under the thread that runs it on and on. */
	if (word == HV_CLOSED && __atomic_load_n(&exiting, __ATOMIC_RELAXED))
		return HV_EXITING;
	if (word)
		return word;
	/* The timer refuses a negative time, which is as much in the past as 1. */
	word = run_acquired(v, deadline_ns < 0 ? 1 : deadline_ns);
	v->between = word == HV_RETRY || word == HV_RING_FULL || word == HV_DIRTY ? runner.tid : 0;
	release(v);
	return word;
}

/* The same with a time limit from now on; timeout_ns < 0: none. */
int64_t hv_run(struct hv_vcpu *v, int64_t timeout_ns)
{
	return hv_run_until(v, timeout_ns < 0 ? 0 : hv_monotonic_ns() + timeout_ns);
}

/* Acquired: see hv_complete(). */
static int64_t complete(struct hv_vcpu *v)
{
	int rc;

	if (v->held == HELD_UNREAD) {
		/* Whoever changes the state gives up the exit, but a read's instruction still wants
		 * its data. */
		v->held = 0;
		pack_exit(v);
	}
	if (v->generation != generation)
		return HV_FORKED;
	if (v->unanswered)
		return HV_UNANSWERED;
	if (!v->incomplete || v->held)
		return 0;
	v->run->immediate_exit = 1;
	rc = kvm_run(v);
	v->run->immediate_exit = 0;
	if (!rc)
		v->held = HELD_FURTHER;
	else if (rc != -EINTR)
		return rc;
	else
		v->incomplete = 0;
	return 0;
}

/*
 * Finish the instruction of the last exit without running on: KVM_RUN with immediate_exit.  0, or
 * -errno, or an HV_* code.  A further exit of the same instruction is held and answered by the next
 * hv_run().
 */
int64_t hv_complete(struct hv_vcpu *v)
{
	int64_t word = acquire(v);

	if (word)
		return word;
	word = complete(v);
	release(v);
	return word;
}

/* Acquired: the same for who is about to change the state: not within a read. */
static int64_t complete_for_change(struct hv_vcpu *v)
{
	int64_t rc = complete(v);

	if (!rc && v->held == HELD_FURTHER) {
		uint32_t incomplete = v->incomplete;

		pack_exit(v);
		if (v->unanswered)
			rc = HV_UNANSWERED;
		/* It is still to be handed out, and cannot be answered before. */
		v->unanswered = 0;
		v->incomplete = incomplete;
	}
	return rc;
}

/*
 * For calls that get and set a vCPU's state by ioctls, all in one go (native/state.c): nobody else
 * runs, closes or changes it until hv_unclaim(), the last exit's instruction is finished, and KVM
 * has what was written, and is not to be given a whole state (HV_DIRTY).  0: it is claimed; or
 * -errno, or an HV_* code, and it is not.
 */
int64_t hv_claim(struct hv_vcpu *v)
{
	int64_t rc = hv_claim_dirty(v);

	if (!rc && v->dirty) {
		release(v);
		rc = HV_DIRTY;
	}
	return rc;
}

/* The same for who has the state that is dirty. */
int64_t hv_claim_dirty(struct hv_vcpu *v)
{
	int64_t rc = acquire(v);

	if (rc)
		return rc;
	rc = complete_for_change(v);
	if (!rc)
		rc = put_written(v);
	if (rc)
		release(v);
	return rc;
}

/* The vCPU may be in another state than it was. */
void hv_unclaim(struct hv_vcpu *v)
{
	v->fresh = 0;
	release(v);
}

/*
 * Before an ioctl that gets state: KVM has what is written.  Waits where another thread is about to
 * give it.  0; -errno; HV_CLOSED.
 */
int hv_settle(struct hv_vcpu *v)
{
	struct timespec nap = {.tv_nsec = 50000};

	while (__atomic_load_n(&v->written, __ATOMIC_SEQ_CST)) {
		int64_t rc = acquire_briefly(v, true);

		if (!rc) {
			rc = put_written(v);
			release(v);
		}
		if (rc != HV_BUSY)
			return (int)rc;
		nanosleep(&nap, NULL);
	}
	return 0;
}

/* Before an ioctl that may change the vCPU's state; hv_end() is to be called whatever this says. */
int hv_begin(struct hv_vcpu *v)
{
	__atomic_fetch_add(&v->begun, 1, __ATOMIC_SEQ_CST);
	return hv_settle(v);
}

void hv_end(struct hv_vcpu *v)
{
	__atomic_fetch_add(&v->ended, 1, __ATOMIC_SEQ_CST);
}

/* What of the page is the vCPU's state, or will be: kvm_dirty_regs may also be set by its user. */
static bool is_at_hand(const struct hv_vcpu *v, uint32_t part)
{
	return ((get_fresh(v) | v->written | (uint32_t)v->run->kvm_dirty_regs) & part) != 0;
}

/* For who holds the GIL: it does not wait.  0: acquired; HV_STALE: it is not at hand; HV_CLOSED,
 * ... */
HOT static int acquire_part(struct hv_vcpu *v, uint32_t part)
{
	int64_t rc = acquire_briefly(v, false);

	if (!rc && (v->dirty || !is_at_hand(v, part))) {
		release_briefly(v);
		rc = HV_STALE;
	}
	return (int)rc;
}

/*
 * Copy a register, or all of a part, from the page.  0; HV_STALE; HV_CLOSED, HV_BUSY, HV_FORKED.
 * Sizes are constants, so that no function of another library is called: it would be cold.
 */
HOT int hv_reg_read(struct hv_vcpu *v, uint64_t offset, uint64_t *to)
{
	int rc = acquire_part(v, KVM_SYNC_X86_REGS);

	if (rc)
		return rc;
	memcpy(to, (uint8_t *)&v->run->s.regs.regs + offset, sizeof(*to));
	release_briefly(v);
	return 0;
}

HOT int hv_regs_read(struct hv_vcpu *v, struct kvm_regs *to)
{
	int rc = acquire_part(v, KVM_SYNC_X86_REGS);

	if (rc)
		return rc;
	*to = v->run->s.regs.regs;
	release_briefly(v);
	return 0;
}

HOT int hv_sregs_read(struct hv_vcpu *v, struct kvm_sregs *to)
{
	int rc = acquire_part(v, KVM_SYNC_X86_SREGS);

	if (rc)
		return rc;
	*to = v->run->s.regs.sregs;
	release_briefly(v);
	return 0;
}

/* Acquired: ask KVM for a part, KVM_SYNC_X86_REGS or _SREGS, that is not at hand.  0 or -errno. */
static int fetch(struct hv_vcpu *v, uint32_t part)
{
	uint32_t seen = __atomic_load_n(&v->ended, __ATOMIC_SEQ_CST);
	struct kvm_sync_regs *page = &v->run->s.regs;
	uint32_t before = get_fresh(v);
	int rc;

	if (part == KVM_SYNC_X86_REGS)
		rc = ioctl(v->fd, KVM_GET_REGS_REQUEST, &page->regs);
	else
		rc = ioctl(v->fd, KVM_GET_SREGS_REQUEST, &page->sregs);
	if (rc)
		return -errno;
	set_fresh(v, seen, before | part);
	return 0;
}

/* `size` bytes at `offset` of run->s.regs, by an ioctl where they are not at hand.  0; -errno;
 * HV_CLOSED, HV_BUSY, HV_FORKED. */
int hv_sync_fetch(struct hv_vcpu *v, uint32_t part, uint64_t offset, uint8_t *to, uint64_t size)
{
	int64_t rc = acquire_briefly(v, true);

	if (rc)
		return (int)rc;
	if (v->dirty)
		rc = HV_DIRTY;
	else if (!is_at_hand(v, part))
		rc = fetch(v, part);
	if (!rc)
		memcpy(to, (uint8_t *)&v->run->s.regs + offset, size);
	release(v);
	return (int)rc;
}

/* Acquired: give KVM what is written, and the exception that was pending; not what else the events
 * were, for an NMI may have come since. */
static int put_written_with(struct hv_vcpu *v, struct kvm_vcpu_events *events)
{
	int rc = put_written(v);

	if (rc || !(events->exception.pending || events->exception.injected))
		return rc;
	events->flags &= KVM_VCPUEVENT_VALID_PAYLOAD;
	return ioctl(v->fd, KVM_SET_VCPU_EVENTS_REQUEST, events) ? -errno : 0;
}

/* No exception is pending: also not the trap of RFLAGS.TF, with which HLT exits, nor the #UD with
 * which KVM gives up on an instruction. */
HOT static bool is_calm(const struct hv_vcpu *v, uint32_t fresh)
{
	return fresh & FRESH_CALM && fresh & KVM_SYNC_X86_REGS &&
	       v->run->exit_reason != KVM_EXIT_INTERNAL_ERROR &&
	       !(v->run->s.regs.regs.rflags & RFLAGS_TF);
}

/* Acquired: the general registers, in part or whole, into the page; KVM has them before it runs. */
static int64_t write_regs(struct hv_vcpu *v, uint64_t offset, const uint8_t *from, uint64_t size)
{
	uint32_t seen = __atomic_load_n(&v->ended, __ATOMIC_SEQ_CST);
	struct kvm_regs *regs = &v->run->s.regs.regs;
	struct kvm_vcpu_events events = {0};
	uint32_t fresh = get_fresh(v);
	bool at_once;

	if (!is_calm(v, fresh)) {
		/* It may deliver the exception's payload: to CR2, which is in SREGS. */
		fresh &= ~(uint32_t)KVM_SYNC_X86_SREGS;
		if (ioctl(v->fd, KVM_GET_VCPU_EVENTS_REQUEST, &events))
			return -errno;
	}
	memcpy((uint8_t *)regs + offset, from, size);
	regs->rflags |= RFLAGS_FIXED;
	__atomic_store_n(&v->written, KVM_SYNC_X86_REGS, __ATOMIC_SEQ_CST);
	/* KVM need not keep all flags as they are, or somebody may be looking past us. */
	at_once = regs->rflags & ~(uint64_t)(RFLAGS_PLAIN | RFLAGS_FIXED) ||
		  events.exception.pending || events.exception.injected ||
		  __atomic_load_n(&v->begun, __ATOMIC_SEQ_CST) != seen;
	if (at_once) {
		v->fresh = 0;
		return put_written_with(v, &events);
	}
	set_fresh(v, seen, fresh | FRESH_CALM);
	return 0;
}

/*
 * Write `size` bytes at `offset` of struct kvm_regs, the last exit's instruction finished first.
 * Without `may_wait`, for who holds the GIL, HV_STALE where that, or an ioctl, would be needed.  0;
 * -errno; HV_CLOSED, HV_BUSY, HV_FORKED, HV_UNANSWERED, HV_STALE.
 */
HOT int64_t hv_regs_write(struct hv_vcpu *v, uint64_t offset, const uint8_t *from, uint64_t size,
			  uint32_t may_wait)
{
	int64_t rc = acquire_briefly(v, may_wait);

	if (rc)
		return rc;
	if (v->dirty) {
		rc = HV_DIRTY;
	} else if (may_wait) {
		rc = complete_for_change(v);
		if (!rc && !is_at_hand(v, KVM_SYNC_X86_REGS) && size < sizeof(struct kvm_regs))
			rc = fetch(v, KVM_SYNC_X86_REGS);
	} else if (v->unanswered || v->incomplete || v->held || !is_calm(v, get_fresh(v)) ||
		   offset + size > RFLAGS_OFFSET || !is_at_hand(v, KVM_SYNC_X86_REGS) ||
		   v->run->s.regs.regs.rflags & ~(uint64_t)(RFLAGS_PLAIN | RFLAGS_FIXED)) {
		rc = HV_STALE;
	}
	if (!rc)
		rc = write_regs(v, offset, from, size);
	release_briefly(v);
	return rc;
}

/* Acquired: CR8 as KVM_SET_SREGS has taken it, for the next KVM_RUN, which loads it from the page
 * unless KVM has the APIC.  More than 4 bits KVM_SET_SREGS ignores, and KVM_RUN refuses. */
void hv_keep_cr8(struct hv_vcpu *v, uint64_t cr8)
{
	if (cr8 <= 0xf)
		v->run->cr8 = cr8;
}

/* The same for who has not acquired it.  Another thread that runs it has CR8 of its own. */
void hv_write_cr8(struct hv_vcpu *v, uint64_t cr8)
{
	if (acquire_briefly(v, true))
		return;
	hv_keep_cr8(v, cr8);
	release_briefly(v);
}

/*
 * KVM_SET_SREGS, the last exit's instruction finished first.  0; -errno; HV_CLOSED, HV_BUSY,
 * HV_FORKED, HV_UNANSWERED.
 */
int64_t hv_sregs_put(struct hv_vcpu *v, const struct kvm_sregs *sregs)
{
	int64_t rc = acquire_briefly(v, true);

	if (rc)
		return rc;
	rc = v->dirty ? HV_DIRTY : complete_for_change(v);
	if (!rc)
		rc = put_written(v); /* the reset vector, at which it wakes, is also RIP */
	if (!rc && ioctl(v->fd, KVM_SET_SREGS_REQUEST, sregs))
		rc = -errno;
	if (!rc) {
		v->run->kvm_dirty_regs &= ~(uint64_t)KVM_SYNC_X86_SREGS;
		hv_keep_cr8(v, sregs->cr8);
		v->fresh &= ~(uint32_t)KVM_SYNC_X86_SREGS;
	}
	release(v);
	return rc;
}

/*
 * Python could not take the exit that hv_run() has just answered (a signal's handler raised): the
 * next hv_run() answers it again, and no rule serves or records it twice.  0; HV_CLOSED, HV_BUSY.
 */
int hv_unread(struct hv_vcpu *v)
{
	int64_t rc = acquire(v);

	if (rc)
		return (int)rc;
	v->held = HELD_UNREAD;
	v->unanswered = 0;
	release(v);
	return 0;
}

/* A run that was to go on does not: Python has raised. */
void hv_run_ends(struct hv_vcpu *v)
{
	__atomic_store_n(&v->between, 0, __ATOMIC_SEQ_CST);
}

/* Whether a signal that is chained has come since the vCPU was last interrupted by one. */
int hv_signalled(const struct hv_vcpu *v)
{
	return __atomic_load_n(&nr_signals, __ATOMIC_SEQ_CST) != v->signals;
}

/* A place in the kvm_run page for Python to copy from or to, with the vCPU acquired; 0 or a code.
 */
static int acquire_page(struct hv_vcpu *v, uint64_t offset, uint64_t size)
{
	int64_t rc = acquire_briefly(v, true);

	if (rc)
		return (int)rc;
	if (offset <= v->run_size && size <= v->run_size - offset)
		return 0;
	release(v);
	return -EINVAL;
}

/*
 * Copy out of and into the kvm_run page, while nobody runs the vCPU.  0; HV_CLOSED, HV_BUSY,
 * HV_FORKED; -EINVAL: beyond the page.
 */
int hv_page_read(struct hv_vcpu *v, uint64_t offset, uint8_t *to, uint64_t size)
{
	int rc = acquire_page(v, offset, size);

	if (rc)
		return rc;
	memcpy(to, (uint8_t *)v->run + offset, size);
	release(v);
	return 0;
}

int hv_page_write(struct hv_vcpu *v, uint64_t offset, const uint8_t *from, uint64_t size)
{
	int rc = acquire_page(v, offset, size);

	if (rc)
		return rc;
	/* Its user decides from here on what is dirty, and with what. */
	rc = put_written(v);
	if (!rc) {
		if (offset + size > offsetof(struct kvm_run, s))
			v->fresh &= FRESH_RAN;
		memcpy((uint8_t *)v->run + offset, from, size);
	}
	release(v);
	return rc;
}

/* ---- answering reads ---- */

/* Where the answer to the exit at hand goes, and its size in bytes; NULL where nothing is asked. */
static uint8_t *answer_slot(struct hv_vcpu *v, uint64_t *size, uint32_t *element)
{
	struct access a;

	if (v->incomplete && !v->held && v->run->exit_reason == KVM_EXIT_HYPERCALL) {
		*size = *element = sizeof(v->run->hypercall.ret);
		return (uint8_t *)&v->run->hypercall.ret;
	}
	if (!v->unanswered)
		return NULL;
	if (v->run->exit_reason == KVM_EXIT_X86_RDMSR) {
		*size = *element = sizeof(v->run->msr.data);
		v->run->msr.error = 0;
		return (uint8_t *)&v->run->msr.data;
	}
	if (!get_access(v, &a))
		return NULL;
	*size = a.bytes;
	*element = a.size;
	return a.data;
}

/*
 * Answer every element of the pending read with `value`, little-endian.  0; HV_CLOSED, HV_BUSY;
 * -EINVAL: no read is pending; -ERANGE: the value needs more than the access's size.
 */
int hv_answer(struct hv_vcpu *v, uint64_t value)
{
	uint32_t element = 0;
	uint64_t size = 0;
	uint8_t *slot;
	int64_t rc = acquire(v);

	if (rc)
		return (int)rc;
	slot = answer_slot(v, &size, &element);
	if (!slot) {
		rc = -EINVAL;
	} else if (element < 8 && value >> (8 * element)) {
		rc = -ERANGE;
	} else {
		for (uint64_t at = 0; at < size; at += element)
			memcpy(slot + at, &value, element);
		v->unanswered = 0;
	}
	release(v);
	return (int)rc;
}

/* Answer with `size` bytes.  0; HV_CLOSED, HV_BUSY; -EINVAL: no read is pending; -EMSGSIZE: not its
 * size. */
int hv_answer_bytes(struct hv_vcpu *v, const uint8_t *data, uint64_t size)
{
	uint32_t element = 0;
	uint64_t wanted = 0;
	uint8_t *slot;
	int64_t rc = acquire(v);

	if (rc)
		return (int)rc;
	slot = answer_slot(v, &wanted, &element);
	if (!slot) {
		rc = -EINVAL;
	} else if (size != wanted) {
		rc = -EMSGSIZE;
	} else {
		memcpy(slot, data, size);
		v->unanswered = 0;
	}
	release(v);
	return (int)rc;
}

/* Let the guest's RDMSR or WRMSR of the exit at hand raise #GP.  0; HV_CLOSED, HV_BUSY; -EINVAL: no
 * such exit. */
int hv_fail_msr(struct hv_vcpu *v)
{
	int64_t rc = acquire(v);

	if (rc)
		return (int)rc;
	if (v->incomplete && !v->held &&
	    (v->run->exit_reason == KVM_EXIT_X86_RDMSR ||
	     v->run->exit_reason == KVM_EXIT_X86_WRMSR)) {
		v->run->msr.error = 1;
		v->unanswered = 0;
	} else {
		rc = -EINVAL;
	}
	release(v);
	return (int)rc;
}

/* ---- the batch, changed while nobody runs it ---- */

/* Serve exits of `v` by `batch` (NULL: by none).  0, HV_BUSY or HV_CLOSED. */
int hv_set_batch(struct hv_vcpu *v, struct hv_batch *batch)
{
	int64_t rc = acquire(v);

	if (rc)
		return (int)rc;
	v->batch = batch;
	release(v);
	return 0;
}

/*
 * Give `batch` new rules; `next` carries only rules, defaults, limit and records.  `v` is the vCPU
 * it serves, or NULL.  0, HV_BUSY or HV_CLOSED.
 */
int hv_batch_update(struct hv_vcpu *v, struct hv_batch *batch, const struct hv_batch *next)
{
	int64_t rc = v ? acquire(v) : 0;

	if (rc)
		return (int)rc;
	batch->pio = next->pio;
	batch->mmio = next->mmio;
	batch->nr_pio = next->nr_pio;
	batch->nr_mmio = next->nr_mmio;
	batch->unclaimed_pio = next->unclaimed_pio;
	batch->unclaimed_mmio = next->unclaimed_mmio;
	batch->max_exits = next->max_exits;
	batch->timestamps = next->timestamps;
	if (batch->records != next->records) {
		batch->records = next->records;
		batch->records_capacity = next->records_capacity;
		batch->nr_records = 0;
	}
	if (v)
		release(v);
	return 0;
}

/* Move the first records out, up to `room` of them; the rest moves up.  How many, or HV_BUSY. */
int64_t hv_take_records(struct hv_vcpu *v, struct hv_batch *batch, struct hv_record *to,
			uint64_t room)
{
	int64_t rc = v ? acquire(v) : 0;
	uint64_t n;

	if (rc == HV_BUSY)
		return rc;
	n = min64(batch->nr_records, room);
	memcpy(to, batch->records, n * sizeof(*to));
	batch->nr_records -= n;
	memmove(batch->records, batch->records + n, batch->nr_records * sizeof(*to));
	if (v && !rc)
		release(v);
	return (int64_t)n;
}
