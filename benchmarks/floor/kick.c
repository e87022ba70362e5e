/*
 * A kick in C: set immediate_exit, send the runner a real-time signal, and see when KVM_RUN
 * returns.
 *
 * The runner is a thread of C.  It can run the floor's vCPU or, so that the same clock is read at
 * the same place for both, somebody else's, given as the function that enters it.
 */
#define _GNU_SOURCE
#include "vm.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <time.h>

struct floor_runner {
	int64_t (*enter)(void *vcpu, int64_t timeout_ns);
	void *vcpu;
	int64_t again;
	int cpu; /* where the thread runs; negative: anywhere */
	pthread_t thread;
	sem_t go;
	sem_t done;
	int stop;
	int64_t rc;
	int64_t left_ns; /* when enter() returned */
};

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void nothing(int signal)
{
	(void)signal;
}

static int64_t enter_floor(void *vcpu, int64_t timeout_ns)
{
	struct floor_vm *v = vcpu;

	(void)timeout_ns;
	/* The signal of the last kick may come after its KVM_RUN has returned. */
	while (ioctl(v->vcpu, KVM_RUN, 0) < 0)
		if (errno != EINTR || v->run->immediate_exit)
			return -errno;
	return v->run->exit_reason;
}

static void *run(void *data)
{
	struct floor_runner *r = data;
	cpu_set_t cpus;

	if (r->cpu >= 0) {
		CPU_ZERO(&cpus);
		CPU_SET(r->cpu, &cpus);
		sched_setaffinity(0, sizeof(cpus), &cpus);
	}
	for (;;) {
		while (sem_wait(&r->go) < 0)
			; /* a signal that came too late for the guest */
		if (__atomic_load_n(&r->stop, __ATOMIC_SEQ_CST))
			return NULL;
		do
			r->rc = r->enter(r->vcpu, -1);
		while (r->rc == r->again);
		r->left_ns = now_ns();
		sem_post(&r->done);
	}
}

/*
 * `enter` NULL: `vcpu` is a struct floor_vm.  Where enter() answers `again`, it is called again.
 * NULL and errno when it fails.
 */
struct floor_runner *floor_runner_new(int64_t (*enter)(void *, int64_t), void *vcpu, int64_t again,
				      int cpu)
{
	struct sigaction wake = {.sa_handler = nothing};
	struct floor_runner *r = calloc(1, sizeof(*r));
	int rc;

	if (!r || sigaction(SIGRTMIN, &wake, NULL) < 0) {
		free(r);
		return NULL;
	}
	r->enter = enter ? enter : enter_floor;
	r->vcpu = vcpu;
	r->again = again;
	r->cpu = cpu;
	sem_init(&r->go, 0, 0);
	sem_init(&r->done, 0, 0);
	rc = pthread_create(&r->thread, NULL, run, r);
	if (rc) {
		free(r);
		errno = rc;
		return NULL;
	}
	return r;
}

/* Enter the guest once. */
void floor_runner_go(struct floor_runner *r)
{
	sem_post(&r->go);
}

/* Wait for the guest to be left: when that was (CLOCK_MONOTONIC), what enter() answered in *rc. */
int64_t floor_runner_wait(struct floor_runner *r, int64_t *rc)
{
	while (sem_wait(&r->done) < 0)
		;
	*rc = r->rc;
	return r->left_ns;
}

void floor_runner_free(struct floor_runner *r)
{
	__atomic_store_n(&r->stop, 1, __ATOMIC_SEQ_CST);
	sem_post(&r->go);
	pthread_join(r->thread, NULL);
	sem_destroy(&r->go);
	sem_destroy(&r->done);
	free(r);
}

/* `nr` kicks, each after the guest has run for `gap_ns`: from the call to KVM_RUN's return, in ns.
 * 0 or -errno. */
int floor_kicks(struct floor_vm *v, int cpu, uint64_t nr, int64_t gap_ns, int64_t *latency_ns)
{
	struct timespec gap = {.tv_sec = gap_ns / 1000000000, .tv_nsec = gap_ns % 1000000000};
	struct floor_runner *r = floor_runner_new(NULL, v, 0, cpu);
	int64_t rc = -EINTR;

	if (!r)
		return -errno;
	for (uint64_t i = 0; i < nr && rc == -EINTR; i++) {
		int64_t start;

		floor_runner_go(r);
		nanosleep(&gap, NULL);
		start = now_ns();
		__atomic_store_n(&v->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
		pthread_kill(r->thread, SIGRTMIN);
		latency_ns[i] = floor_runner_wait(r, &rc) - start;
		v->run->immediate_exit = 0;
	}
	floor_runner_free(r);
	return rc == -EINTR ? 0 : -EPROTO;
}
