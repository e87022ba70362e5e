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
 *
 * So are the registers of Cpu, attributes that read and write the kvm_run page; what takes more
 * than that is Cpu._fetch_register(offset), _put_register(offset, value), _fetch_value(offset)
 * and _put_value(offset, value), by offsets in struct kvm_sync_regs.
 */
#if !defined(Py_GIL_DISABLED)
#define Py_LIMITED_API 0x030b0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "kvm_uapi.h"
#include "run.h"

/* What runs at every exit lies together, and with that of run.c: after an exit a page of code that
 * was not used for the last one is a cache and TLB miss. */
#define HOT __attribute__((hot))

/* Exit words that say all there is, and their exits; direct-mapped, guarded by the GIL. */
#define NR_KNOWN 4096

struct known {
	int64_t word;
	PyObject *exit;
};

static struct known known[NR_KNOWN];
static PyObject *name_address, *name_exit, *name_between, *name_deadline, *name_until,
	*name_timeout, *name_kick_closed, *name_data, *name_fetch, *name_put, *name_fetch_value,
	*name_put_value;

HOT static struct known *find(int64_t word)
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

HOT static struct hv_vcpu *vcpu_of(PyObject *self)
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

HOT static PyObject *known_exit(PyObject *self, int64_t word)
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
HOT static PyObject *finish(PyObject *self, struct hv_vcpu *v, int64_t word)
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

HOT static PyObject *run_until(PyObject *self, int64_t deadline)
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
		if (word != HV_RETRY && word != HV_RING_FULL && word != HV_DIRTY)
			return finish(self, v, word);
		between = PyErr_CheckSignals() ? NULL : call_python(self, name_between, word);
		if (!between) {
			hv_run_ends(v);
			return NULL;
		}
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

HOT static PyObject *method_run(PyObject *self, PyObject *const *args, Py_ssize_t nargs,
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

/* The docstring of an attribute, kept for as long as the process lives; NULL where `docs` has none.
 * 0, or -1 with an error. */
static int read_doc(PyObject *docs, const char *name, const char **to)
{
	PyObject *doc = PyDict_GetItemString(docs, name);
	const char *text = doc ? PyUnicode_AsUTF8AndSize(doc, NULL) : NULL;

	if (doc && !text)
		return -1;
	if (text && !*to)
		*to = strdup(text);
	return 0;
}

/* Give a class an attribute; takes the descriptor.  0, or -1 with an error. */
static int add_descriptor(PyObject *cls, const char *name, PyObject *descriptor)
{
	int rc = descriptor ? PyObject_SetAttrString(cls, name, descriptor) : -1;

	Py_DecRef(descriptor);
	return rc;
}

/* install(cls, docs): give class Vcpu the methods above; docs maps their names to docstrings. */
static PyObject *install(PyObject *module, PyObject *args)
{
	PyObject *cls, *docs;

	(void)module;
	if (!PyArg_ParseTuple(args, "O!O!:install", &PyType_Type, &cls, &PyDict_Type, &docs))
		return NULL;
	for (PyMethodDef *method = vcpu_methods; method->ml_name; method++)
		if (read_doc(docs, method->ml_name, &method->ml_doc) ||
		    add_descriptor(cls, method->ml_name,
				   PyDescr_NewMethod((PyTypeObject *)cls, method)))
			return NULL;
	Py_RETURN_NONE;
}

/* ---- the registers of a Cpu ---- */

/* hvmodel.state.Regs and Sregs, once somebody has asked for one. */
static PyTypeObject *value_types[2];

/* A value has one slot, its bytes, and nothing else: install_values() makes sure of that. */
struct value {
	PyObject ob_base;
	PyObject *data;
};

/*
 * What Cpu inherits from: which vCPU it is.  A struct hv_vcpu is never freed but may be used again,
 * with another serial number.
 */
struct registers {
	PyObject ob_base;
	struct hv_vcpu *v;
	uint64_t serial;
};

HOT static struct hv_vcpu *vcpu_of_cpu(PyObject *self)
{
	struct registers *cpu = (struct registers *)self;

	return cpu->v && cpu->v->serial == cpu->serial ? cpu->v : NULL;
}

/* _bind(address): it is the vCPU of this struct hv_vcpu. */
static PyObject *bind(PyObject *self, PyObject *address)
{
	struct registers *cpu = (struct registers *)self;
	struct hv_vcpu *v = PyLong_AsVoidPtr(address);

	if (!v && PyErr_Occurred())
		return NULL;
	cpu->v = v;
	cpu->serial = v ? v->serial : 0;
	Py_RETURN_NONE;
}

/* What an attribute's descriptor carries: the offset in struct kvm_sync_regs. */
static uint32_t offset_of(void *closure)
{
	return (uint32_t)(uintptr_t)closure;
}

/* `value` may be NULL. */
static PyObject *call_with_offset(PyObject *self, PyObject *method, void *closure, PyObject *value)
{
	PyObject *offset = PyLong_FromUnsignedLong(offset_of(closure));
	PyObject *result;

	if (!offset)
		return NULL;
	result = PyObject_CallMethodObjArgs(self, method, offset, value, NULL);
	Py_DecRef(offset);
	return result;
}

static int set_by_python(PyObject *self, PyObject *method, void *closure, PyObject *value)
{
	PyObject *done;

	if (!value) {
		PyErr_SetString(PyExc_AttributeError, "a register cannot be deleted");
		return -1;
	}
	done = call_with_offset(self, method, closure, value);
	if (!done)
		return -1;
	Py_DecRef(done);
	return 0;
}

HOT static PyObject *get_register(PyObject *self, void *closure)
{
	struct hv_vcpu *v = vcpu_of_cpu(self);
	uint64_t number;

	if (v && !hv_reg_read(v, offset_of(closure), &number))
		return PyLong_FromUnsignedLongLong(number);
	return call_with_offset(self, name_fetch, closure, NULL);
}

HOT static int set_register(PyObject *self, PyObject *value, void *closure)
{
	struct hv_vcpu *v = vcpu_of_cpu(self);
	uint64_t number;

	if (v && value && PyLong_CheckExact(value)) {
		number = PyLong_AsUnsignedLongLong(value);
		if (number == UINT64_MAX && PyErr_Occurred())
			PyErr_Clear();
		else if (!hv_regs_write(v, offset_of(closure), (uint8_t *)&number, sizeof(number),
					0))
			return 0;
	}
	return set_by_python(self, name_put, closure, value);
}

HOT static PyObject *get_value(PyObject *self, void *closure)
{
	bool is_sregs = offset_of(closure) != 0;
	PyTypeObject *type = value_types[is_sregs];
	struct hv_vcpu *v = vcpu_of_cpu(self);
	PyObject *data, *value;
	void *to;
	int rc;

	if (!v || !type)
		return call_with_offset(self, name_fetch_value, closure, NULL);
	data = PyBytes_FromStringAndSize(NULL, is_sregs ? sizeof(struct kvm_sregs)
							: sizeof(struct kvm_regs));
	if (!data)
		return NULL;
	to = PyBytes_AsString(data);
	rc = is_sregs ? hv_sregs_read(v, to) : hv_regs_read(v, to);
	if (rc) {
		Py_DecRef(data);
		return call_with_offset(self, name_fetch_value, closure, NULL);
	}
	value = PyType_GenericAlloc(type, 0);
	if (!value) {
		Py_DecRef(data);
		return NULL;
	}
	((struct value *)value)->data = data;
	return value;
}

static int set_value(PyObject *self, PyObject *value, void *closure)
{
	return set_by_python(self, name_put_value, closure, value);
}

/* In the order of struct kvm_regs, which is the first in struct kvm_sync_regs. */
static const char *const register_names[] = {
	"rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8",
	"r9",  "r10", "r11", "r12", "r13", "r14", "r15", "rip", "rflags",
};
#define NR_REGISTERS (sizeof(register_names) / sizeof(register_names[0]))
_Static_assert(NR_REGISTERS * sizeof(uint64_t) == sizeof(struct kvm_regs), "a name per register");
_Static_assert(offsetof(struct kvm_sync_regs, regs) == 0, "regs are first");

/* Descriptors refer to these, too: the registers, and then the values. */
static PyGetSetDef getset[NR_REGISTERS + 2] = {
	[NR_REGISTERS] = {"regs", get_value, set_value, NULL, NULL},
	[NR_REGISTERS + 1] = {"sregs", get_value, set_value, NULL,
			      (void *)offsetof(struct kvm_sync_regs, sregs)},
};

static PyMethodDef registers_methods[] = {
	{"_bind", bind, METH_O, "_bind(address): it is the vCPU of this struct hv_vcpu"},
	{NULL, NULL, 0, NULL},
};

static PyType_Slot registers_slots[] = {
	{Py_tp_doc, "The registers of a vCPU, in its kvm_run page."},
	{Py_tp_methods, registers_methods},
	{0, NULL},
};

static PyType_Spec registers_spec = {
	.name = "hvmodel._run.Registers",
	.basicsize = sizeof(struct registers),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
	.slots = registers_slots,
};

static PyObject *registers_type;

/* install_registers(cls, docs): give class Cpu the attributes above. */
static PyObject *install_registers(PyObject *module, PyObject *args)
{
	PyObject *cls, *docs;

	(void)module;
	if (!PyArg_ParseTuple(args, "O!O!:install_registers", &PyType_Type, &cls, &PyDict_Type,
			      &docs))
		return NULL;
	if (!PyType_IsSubtype((PyTypeObject *)cls, (PyTypeObject *)registers_type)) {
		PyErr_SetString(PyExc_TypeError, "not a class of Registers");
		return NULL;
	}
	for (size_t i = 0; i < NR_REGISTERS; i++) {
		getset[i].name = register_names[i];
		getset[i].get = get_register;
		getset[i].set = set_register;
		getset[i].closure = (void *)(i * sizeof(uint64_t));
	}
	for (size_t i = 0; i < sizeof(getset) / sizeof(getset[0]); i++)
		if (read_doc(docs, getset[i].name, &getset[i].doc) ||
		    add_descriptor(cls, getset[i].name,
				   PyDescr_NewGetSet((PyTypeObject *)cls, &getset[i])))
			return NULL;
	Py_RETURN_NONE;
}

/* Whether what get_value() makes of this class has `_data`.  0, or -1 with an error. */
static int check_value_type(PyTypeObject *type)
{
	PyObject *size = PyObject_GetAttrString((PyObject *)type, "__basicsize__");
	PyObject *data, *value = NULL, *found = NULL;
	int rc = -1;

	if (!size)
		return -1;
	if (PyLong_AsSize_t(size) != sizeof(struct value))
		goto out;
	data = PyBytes_FromStringAndSize("", 0);
	value = data ? PyType_GenericAlloc(type, 0) : NULL;
	if (!value) {
		Py_DecRef(data);
		goto out;
	}
	((struct value *)value)->data = data;
	found = PyObject_GetAttr(value, name_data);
	if (found == data)
		rc = 0;
out:
	if (rc && !PyErr_Occurred())
		PyErr_SetString(PyExc_SystemError, "a value is one slot, `_data`");
	Py_DecRef(size);
	Py_DecRef(value);
	Py_DecRef(found);
	return rc;
}

/* install_values(regs, sregs): the classes of Cpu.regs and Cpu.sregs; they have a slot `_data`. */
static PyObject *install_values(PyObject *module, PyObject *args)
{
	PyObject *types[2];

	(void)module;
	if (!PyArg_ParseTuple(args, "O!O!:install_values", &PyType_Type, &types[0], &PyType_Type,
			      &types[1]))
		return NULL;
	if (types[0] == (PyObject *)value_types[0] && types[1] == (PyObject *)value_types[1])
		Py_RETURN_NONE;
	if (check_value_type((PyTypeObject *)types[0]) ||
	    check_value_type((PyTypeObject *)types[1]))
		return NULL;
	for (int i = 0; i < 2; i++) {
		PyTypeObject *old = value_types[i];

		Py_IncRef(types[i]);
		value_types[i] = (PyTypeObject *)types[i];
		if (old)
			Py_DecRef((PyObject *)old);
	}
	Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
	{"install", install, METH_VARARGS,
	 "install(cls, docs): give class Vcpu run(), run_until() and kick()"},
	{"install_registers", install_registers, METH_VARARGS,
	 "install_registers(cls, docs): give class Cpu rax to rflags, regs and sregs"},
	{"install_values", install_values, METH_VARARGS,
	 "install_values(regs, sregs): the classes of Cpu.regs and Cpu.sregs"},
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
	PyObject *module;

	name_address = PyUnicode_InternFromString("_address");
	name_exit = PyUnicode_InternFromString("_exit");
	name_deadline = PyUnicode_InternFromString("_deadline");
	name_until = PyUnicode_InternFromString("_until");
	name_between = PyUnicode_InternFromString("_between");
	name_timeout = PyUnicode_InternFromString("timeout");
	name_kick_closed = PyUnicode_InternFromString("_kick_closed");
	name_data = PyUnicode_InternFromString("_data");
	name_fetch = PyUnicode_InternFromString("_fetch_register");
	name_put = PyUnicode_InternFromString("_put_register");
	name_fetch_value = PyUnicode_InternFromString("_fetch_value");
	name_put_value = PyUnicode_InternFromString("_put_value");
	if (!name_data || !name_fetch || !name_put || !name_fetch_value || !name_put_value ||
	    !name_kick_closed || !name_address || !name_exit || !name_deadline || !name_until ||
	    !name_between || !name_timeout)
		return NULL;
	registers_type = PyType_FromSpec(&registers_spec);
	if (!registers_type)
		return NULL;
	module = PyModule_Create(&definition);
	if (module && PyModule_AddObjectRef(module, "Registers", registers_type)) {
		Py_DecRef(module);
		module = NULL;
	}
	return module;
}
