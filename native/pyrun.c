// SPDX-License-Identifier: MIT
/*
 * Vcpu.run(), run_until() and kick() as C methods: hvmodel._run, a second module in the same
 * library as hvmodel._native.
 *
 * After an exit caches, TLB and branch predictors are cold, and what Python executes then costs
 * several times what it costs in a loop of its own: a call through cffi, a Python frame and a
 * dictionary look-up are half of a real-mode exit.  So the common path is here: release the GIL,
 * hv_run_until(), and hand out the exit object that was made when the same exit word was first
 * seen.  Everything else is Python's: Vcpu._exit(word), Vcpu._deadline(timeout) and
 * Vcpu._until(deadline).
 */
#if !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <string.h>

#include "kvm_uapi.h"
#include "run.h"

/* Exit words that say all there is, and their exits; direct-mapped, guarded by the GIL. */
#define NR_KNOWN 4096

struct known {
	int64_t word;
	PyObject *exit;
};

static struct known known[NR_KNOWN];
static PyObject *name_address, *name_exit, *name_between, *name_deadline, *name_until,
	*name_timeout, *name_kick_closed;

static struct known *find(int64_t word)
{
	uint64_t hash = (uint64_t)word * 0x9e3779b97f4a7c15u;

	return &known[hash >> 52];
}

/*
 * The same for MMIO exits, whose address and data do not fit into a word.  What they are depends on
 * the VM's memslots (an access inside one is a host fault), so the table is forgotten when any VM's
 * slots change.
 */
#define NR_KNOWN_MMIO 1024

struct known_mmio {
	struct hv_vcpu *v;
	uint64_t gpa;
	uint64_t data;
	uint64_t size_and_direction;
	PyObject *exit;
};

static struct known_mmio known_mmio[NR_KNOWN_MMIO];
static uint64_t nr_forgotten; /* how often the table was forgotten */

static struct known_mmio *find_mmio(struct hv_vcpu *v, struct known_mmio *wanted)
{
	const struct kvm_run_mmio *mmio = &v->exit->mmio;
	uint64_t hash;

	*wanted = (struct known_mmio){.v = v, .gpa = mmio->phys_addr};
	wanted->size_and_direction = mmio->len | (uint64_t)mmio->is_write << 32;
	if (mmio->is_write)
		memcpy(&wanted->data, mmio->data, mmio->len < 8 ? mmio->len : 8);
	hash = (wanted->gpa ^ wanted->data << 20 ^ wanted->size_and_direction ^ (uintptr_t)v >> 4) *
	       0x9e3779b97f4a7c15u;
	return &known_mmio[hash >> 54];
}

static PyObject *forget_mmio(PyObject *module, PyObject *unused)
{
	(void)module;
	(void)unused;
	nr_forgotten++;
	for (int i = 0; i < NR_KNOWN_MMIO; i++) {
		PyObject *exit = known_mmio[i].exit;

		if (!exit)
			continue;
		known_mmio[i].exit = NULL;
		Py_DecRef(exit);
	}
	Py_RETURN_NONE;
}

static struct hv_vcpu *vcpu_of(PyObject *self)
{
	PyObject *address = PyObject_GetAttr(self, name_address);
	void *v;

	if (!address)
		return NULL;
	v = PyLong_AsVoidPtr(address);
	Py_DecRef(address);
	if (!v && !PyErr_Occurred())
		PyErr_SetString(PyExc_SystemError, "a Vcpu without a struct hv_vcpu");
	return v;
}

/* Put `exit` where an older one may be. */
static void replace(PyObject **place, PyObject *exit)
{
	PyObject *old = *place;

	Py_IncRef(exit);
	*place = exit;
	if (old)
		Py_DecRef(old);
}

static PyObject *call_python(PyObject *self, PyObject *method, int64_t word)
{
	PyObject *number = PyLong_FromLongLong(word);
	PyObject *result;

	if (!number)
		return NULL;
	result = PyObject_CallMethodObjArgs(self, method, number, NULL);
	Py_DecRef(number);
	return result;
}

static PyObject *ask_python(PyObject *self, int64_t word)
{
	return call_python(self, name_exit, word);
}

static PyObject *mmio_exit(PyObject *self, struct hv_vcpu *v, int64_t word)
{
	struct known_mmio wanted, *entry = find_mmio(v, &wanted);
	uint64_t before = nr_forgotten;
	PyObject *exit;

	if (entry->exit && entry->v == v && entry->gpa == wanted.gpa &&
	    entry->data == wanted.data && entry->size_and_direction == wanted.size_and_direction) {
		Py_IncRef(entry->exit);
		return entry->exit;
	}
	exit = ask_python(self, word);
	/* Slots that changed meanwhile may make it another exit the next time. */
	if (exit && before == nr_forgotten) {
		wanted.exit = entry->exit;
		*entry = wanted;
		replace(&entry->exit, exit);
	}
	return exit;
}

static PyObject *known_exit(PyObject *self, int64_t word)
{
	struct known *entry = find(word);
	PyObject *exit;

	if (entry->exit && entry->word == word) {
		Py_IncRef(entry->exit);
		return entry->exit;
	}
	exit = ask_python(self, word);
	if (exit && (word < 0 || !(word & HV_WORD_COMPLEX))) {
		entry->word = word;
		replace(&entry->exit, exit);
	}
	return exit;
}

/* Words that always mean the same Interrupted. */
static bool is_interruption(int64_t word)
{
	return word == HV_KICKED || word == HV_SIGNALED || word == HV_TIMEOUT || word == HV_LIMIT ||
	       word == HV_RECORDS_FULL;
}

static PyObject *interrupted(PyObject *self, struct hv_vcpu *v, int64_t word)
{
	/* A kicker waits for this, which is stored with the GIL held. */
	if (word == HV_KICKED)
		__atomic_store_n(&v->acks, v->kicks, __ATOMIC_SEQ_CST);
	if (word == HV_SIGNALED && PyErr_CheckSignals())
		return NULL;
	return known_exit(self, word);
}

/*
 * The exit of a word, with the GIL held again.  Where a signal has come, its handler is run before
 * the exit is handed out, as late as can be; one that raises leaves the exit for the next run.
 */
static PyObject *finish(PyObject *self, struct hv_vcpu *v, int64_t word)
{
	PyObject *exit;

	if (word < 0)
		return is_interruption(word) ? interrupted(self, v, word) : ask_python(self, word);
	exit = (word & 0xff) == KVM_EXIT_MMIO ? mmio_exit(self, v, word) : known_exit(self, word);
	if (exit && hv_signalled(v) && PyErr_CheckSignals()) {
		Py_DecRef(exit);
		exit = NULL;
	}
	if (!exit)
		hv_unread(v);
	return exit;
}

static PyObject *run_until(PyObject *self, int64_t deadline)
{
	struct hv_vcpu *v = vcpu_of(self);
	PyThreadState *state;
	PyObject *between;
	int64_t word;

	if (!v)
		return NULL;
	for (;;) {
		state = PyEval_SaveThread();
		word = hv_run_until(v, deadline);
		PyEval_RestoreThread(state);
		if (word != HV_RETRY && word != HV_RING_FULL)
			return finish(self, v, word);
		if (PyErr_CheckSignals())
			return NULL;
		between = call_python(self, name_between, word);
		if (!between)
			return NULL;
		Py_DecRef(between);
	}
}

/* Vcpu._deadline(timeout) and Vcpu._until(deadline) check what they are given and answer a deadline
 * in ns. */
static PyObject *run_until_python_says(PyObject *self, PyObject *method, PyObject *arg)
{
	PyObject *number = PyObject_CallMethodObjArgs(self, method, arg, NULL);
	long long deadline;

	if (!number)
		return NULL;
	deadline = PyLong_AsLongLong(number);
	Py_DecRef(number);
	if (deadline == -1 && PyErr_Occurred())
		return NULL;
	return run_until(self, deadline);
}

static PyObject *method_run(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
			    PyObject *names)
{
	Py_ssize_t nr_names = names ? PyTuple_Size(names) : 0;

	if (nargs + nr_names == 0 || (nargs + nr_names == 1 && args[0] == Py_None && !nr_names))
		return run_until(self, 0);
	if (nargs + nr_names > 1) {
		PyErr_Format(PyExc_TypeError, "run() takes at most 1 argument (%zd given)",
			     nargs + nr_names);
		return NULL;
	}
	if (nr_names) {
		int same = PyObject_RichCompareBool(PyTuple_GetItem(names, 0), name_timeout, Py_EQ);

		if (same < 0)
			return NULL;
		if (!same) {
			PyErr_Format(PyExc_TypeError,
				     "run() got an unexpected keyword argument '%U'",
				     PyTuple_GetItem(names, 0));
			return NULL;
		}
	}
	return run_until_python_says(self, name_deadline, args[0]);
}

static PyObject *method_run_until(PyObject *self, PyObject *arg)
{
	long long deadline = PyLong_CheckExact(arg) ? PyLong_AsLongLong(arg) : -1;

	if (deadline >= 0)
		return run_until(self, deadline);
	PyErr_Clear();
	return run_until_python_says(self, name_until, arg);
}

#define KICK_WAIT_NS 1000000

/* The signal is sent before anything else, with the GIL held: until it comes the guest runs on. */
static PyObject *method_kick(PyObject *self, PyObject *unused)
{
	struct hv_vcpu *v = vcpu_of(self);
	uint32_t acks;
	int knows = 0;

	(void)unused;
	if (!v)
		return NULL;
	acks = __atomic_load_n(&v->acks, __ATOMIC_SEQ_CST);
	if (hv_kick_send(v)) {
		PyThreadState *state = PyEval_SaveThread();

		knows = hv_kick_wait(v, acks, KICK_WAIT_NS);
		PyEval_RestoreThread(state);
	} else if (!v->run) {
		return PyObject_CallMethodObjArgs(self, name_kick_closed, NULL);
	}
	return PyBool_FromLong(knows);
}

/* Descriptors refer to these for as long as the process lives. */
static PyMethodDef vcpu_methods[] = {
	{"run", (PyCFunction)(void (*)(void))method_run, METH_FASTCALL | METH_KEYWORDS, NULL},
	{"run_until", method_run_until, METH_O, NULL},
	{"kick", method_kick, METH_NOARGS, NULL},
	{NULL, NULL, 0, NULL},
};

/* install(cls, docs): give class Vcpu the methods above; docs maps their names to docstrings. */
static PyObject *install(PyObject *module, PyObject *args)
{
	PyObject *cls, *docs;

	(void)module;
	if (!PyArg_ParseTuple(args, "O!O!:install", &PyType_Type, &cls, &PyDict_Type, &docs))
		return NULL;
	for (PyMethodDef *method = vcpu_methods; method->ml_name; method++) {
		PyObject *doc = PyDict_GetItemString(docs, method->ml_name);
		PyObject *descriptor;
		const char *text = doc ? PyUnicode_AsUTF8AndSize(doc, NULL) : NULL;
		int rc;

		if (doc && !text)
			return NULL;
		if (text && !method->ml_doc)
			method->ml_doc = strdup(text);
		descriptor = PyDescr_NewMethod((PyTypeObject *)cls, method);
		if (!descriptor)
			return NULL;
		rc = PyObject_SetAttrString(cls, method->ml_name, descriptor);
		Py_DecRef(descriptor);
		if (rc)
			return NULL;
	}
	Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
	{"install", install, METH_VARARGS,
	 "install(cls, docs): give class Vcpu run(), run_until() and kick()"},
	{"forget_mmio", forget_mmio, METH_NOARGS,
	 "forget_mmio(): the memslots of a VM have changed"},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
	.m_base = PyModuleDef_HEAD_INIT,
	.m_name = "hvmodel._run",
	.m_size = -1,
	.m_methods = functions,
};

PyMODINIT_FUNC PyInit__run(void);
PyMODINIT_FUNC PyInit__run(void)
{
	name_address = PyUnicode_InternFromString("_address");
	name_exit = PyUnicode_InternFromString("_exit");
	name_deadline = PyUnicode_InternFromString("_deadline");
	name_until = PyUnicode_InternFromString("_until");
	name_between = PyUnicode_InternFromString("_between");
	name_timeout = PyUnicode_InternFromString("timeout");
	name_kick_closed = PyUnicode_InternFromString("_kick_closed");
	if (!name_kick_closed || !name_address || !name_exit || !name_deadline || !name_until ||
	    !name_between || !name_timeout)
		return NULL;
	return PyModule_Create(&definition);
}
